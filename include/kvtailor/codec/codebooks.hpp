// SPDX-FileCopyrightText: kvtailor contributors
// SPDX-License-Identifier: Apache-2.0
//
// Lloyd-Max levels of one coordinate of a random unit vector times sqrt(head_dim), positive half, and their mean squared
// error. Written by tools/codebooks.py; source: TurboQuant, arXiv 2504.19874, section 3.
#pragma once

namespace kvt::inline v0 {

// half_levels<head_dim, bits>.level[2^(bits-1)]; the other half is its mirror image.
template <int head_dim, int bits>
struct HalfLevels;

template <>
struct HalfLevels<40, 1> {
  static constexpr double distortion = 0.3553734;
  static constexpr float level[1] = {0.8028864f};
};
template <>
struct HalfLevels<40, 2> {
  static constexpr double distortion = 0.1127667;
  static constexpr float level[2] = {0.4517079f, 1.4937221f};
};
template <>
struct HalfLevels<40, 3> {
  static constexpr double distortion = 0.0327097;
  static constexpr float level[4] = {0.2429451f, 0.7474563f, 1.3207080f, 2.0875320f};
};
template <>
struct HalfLevels<40, 4> {
  static constexpr double distortion = 0.0089155;
  static constexpr float level[8] = {0.1267284f, 0.3827299f, 0.6467656f, 0.9257046f,
                                     1.2294895f, 1.5749314f, 1.9967873f, 2.5969732f};
};
template <>
struct HalfLevels<40, 5> {
  static constexpr double distortion = 0.0023378;
  static constexpr float level[16] = {0.0648676f, 0.1949407f, 0.3260405f, 0.4588976f, 0.5943163f, 0.7332161f,
                                      0.8766877f, 1.0260740f, 1.1830935f, 1.3500405f, 1.5301301f, 1.7281441f,
                                      1.9517648f, 2.2147600f, 2.5464507f, 3.0339773f};
};
template <>
struct HalfLevels<40, 6> {
  static constexpr double distortion = 0.0005995;
  static constexpr float level[32] = {0.0328435f, 0.0985743f, 0.1644368f, 0.2305201f, 0.2969157f, 0.3637184f, 0.4310272f,
                                      0.4989465f, 0.5675877f, 0.6370706f, 0.7075251f, 0.7790940f, 0.8519348f, 0.9262239f,
                                      1.0021598f, 1.0799692f, 1.1599131f, 1.2422954f, 1.3274749f, 1.4158806f, 1.5080328f,
                                      1.6045744f, 1.7063143f, 1.8142941f, 1.9298924f, 2.0549947f, 2.1922895f, 2.3458238f,
                                      2.5221537f, 2.7330938f, 3.0038991f, 3.4098189f};
};
template <>
struct HalfLevels<64, 1> {
  static constexpr double distortion = 0.3583874;
  static constexpr float level[1] = {0.8010073f};
};
template <>
struct HalfLevels<64, 2> {
  static constexpr double distortion = 0.1145258;
  static constexpr float level[2] = {0.4521189f, 1.4999748f};
};
template <>
struct HalfLevels<64, 3> {
  static constexpr double distortion = 0.0333908;
  static constexpr float level[4] = {0.2437534f, 0.7506581f, 1.3293429f, 2.1113114f};
};
template <>
struct HalfLevels<64, 4> {
  static constexpr double distortion = 0.0091315;
  static constexpr float level[8] = {0.1273522f, 0.3847183f, 0.6504941f, 0.9318940f,
                                     1.2394042f, 1.5908491f, 2.0233098f, 2.6463705f};
};
template <>
struct HalfLevels<64, 5> {
  static constexpr double distortion = 0.0023992;
  static constexpr float level[16] = {0.0652492f, 0.1961019f, 0.3280317f, 0.4618056f, 0.5982695f, 0.7383922f,
                                      0.8833256f, 1.0344916f, 1.1937153f, 1.3634408f, 1.5471060f, 1.7498428f,
                                      1.9799334f, 2.2522951f, 2.5988917f, 3.1154722f};
};
template <>
struct HalfLevels<64, 6> {
  static constexpr double distortion = 0.0006160;
  static constexpr float level[32] = {0.0330546f, 0.0992096f, 0.1655030f, 0.2320284f, 0.2988820f, 0.3661634f, 0.4339769f,
                                      0.5024324f, 0.5716475f, 0.6417485f, 0.7128730f, 0.7851718f, 0.8588120f, 0.9339808f,
                                      1.0108893f, 1.0897787f, 1.1709276f, 1.2546607f, 1.3413623f, 1.4314923f, 1.5256105f,
                                      1.6244095f, 1.7287631f, 1.8397996f, 1.9590161f, 2.0884669f, 2.2310916f, 2.3913316f,
                                      2.5764144f, 2.7994320f, 3.0885465f, 3.5283619f};
};
template <>
struct HalfLevels<80, 1> {
  static constexpr double distortion = 0.3593890;
  static constexpr float level[1] = {0.8003818f};
};
template <>
struct HalfLevels<80, 2> {
  static constexpr double distortion = 0.1151146;
  static constexpr float level[2] = {0.4522536f, 1.5020613f};
};
template <>
struct HalfLevels<80, 3> {
  static constexpr double distortion = 0.0336201;
  static constexpr float level[4] = {0.2440223f, 0.7517265f, 1.3322387f, 2.1193375f};
};
template <>
struct HalfLevels<80, 4> {
  static constexpr double distortion = 0.0092045;
  static constexpr float level[8] = {0.1275604f, 0.3853827f, 0.6517422f, 0.9339703f,
                                     1.2427393f, 1.5962214f, 2.0322994f, 2.6632193f};
};
template <>
struct HalfLevels<80, 5> {
  static constexpr double distortion = 0.0024200;
  static constexpr float level[16] = {0.0653768f, 0.1964904f, 0.3286983f, 0.4627798f, 0.5995949f, 0.7401293f,
                                      0.8855560f, 1.0373238f, 1.1972944f, 1.3679640f, 1.5528469f, 1.7571971f,
                                      1.9895053f, 2.2650909f, 2.6168453f, 3.1435577f};
};
template <>
struct HalfLevels<80, 6> {
  static constexpr double distortion = 0.0006215;
  static constexpr float level[32] = {0.0331252f, 0.0994224f, 0.1658601f, 0.2325337f, 0.2995409f, 0.3669829f, 0.4349659f,
                                      0.5036016f, 0.5730098f, 0.6433190f, 0.7146693f, 0.7872145f, 0.8611248f, 0.9365911f,
                                      1.0138289f, 1.0930846f, 1.1746425f, 1.2588348f, 1.3460544f, 1.4367721f, 1.5315615f,
                                      1.6311322f, 1.7363810f, 1.8484662f, 1.9689266f, 2.0998760f, 2.2443419f, 2.4069055f,
                                      2.5950320f, 2.8222677f, 3.1178134f, 3.5696333f};
};
template <>
struct HalfLevels<96, 1> {
  static constexpr double distortion = 0.3600559;
  static constexpr float level[1] = {0.7999651f};
};
template <>
struct HalfLevels<96, 2> {
  static constexpr double distortion = 0.1155078;
  static constexpr float level[2] = {0.4523427f, 1.5034528f};
};
template <>
struct HalfLevels<96, 3> {
  static constexpr double distortion = 0.0337735;
  static constexpr float level[4] = {0.2442013f, 0.7524391f, 1.3341741f, 2.1247161f};
};
template <>
struct HalfLevels<96, 4> {
  static constexpr double distortion = 0.0092534;
  static constexpr float level[8] = {0.1276994f, 0.3858261f, 0.6525756f, 0.9353581f,
                                     1.2449712f, 1.5998215f, 2.0383344f, 2.6745601f};
};
template <>
struct HalfLevels<96, 5> {
  static constexpr double distortion = 0.0024339;
  static constexpr float level[16] = {0.0654621f, 0.1967499f, 0.3291435f, 0.4634305f, 0.6004806f, 0.7412907f,
                                      0.8870478f, 1.0392192f, 1.1996913f, 1.3709951f, 1.5566972f, 1.7621341f,
                                      1.9959380f, 2.2737017f, 2.6289488f, 3.1625445f};
};
template <>
struct HalfLevels<96, 6> {
  static constexpr double distortion = 0.0006253;
  static constexpr float level[32] = {0.0331724f, 0.0995645f, 0.1660987f, 0.2328712f, 0.2999810f, 0.3675305f, 0.4356268f,
                                      0.5043831f, 0.5739205f, 0.6443691f, 0.7158707f, 0.7885809f, 0.8626723f, 0.9383381f,
                                      1.0157970f, 1.0952985f, 1.1771312f, 1.2616321f, 1.3492000f, 1.4403133f, 1.5355545f,
                                      1.6356452f, 1.7414975f, 1.8542903f, 1.9755909f, 2.1075532f, 2.2532652f, 2.4174031f,
                                      2.6075949f, 2.8376982f, 3.1376261f, 3.5976546f};
};
template <>
struct HalfLevels<112, 1> {
  static constexpr double distortion = 0.3605319;
  static constexpr float level[1] = {0.7996675f};
};
template <>
struct HalfLevels<112, 2> {
  static constexpr double distortion = 0.1157890;
  static constexpr float level[2] = {0.4524060f, 1.5044471f};
};
template <>
struct HalfLevels<112, 3> {
  static constexpr double distortion = 0.0338834;
  static constexpr float level[4] = {0.2443291f, 0.7529482f, 1.3355590f, 2.1285717f};
};
template <>
struct HalfLevels<112, 4> {
  static constexpr double distortion = 0.0092884;
  static constexpr float level[8] = {0.1277987f, 0.3861431f, 0.6531716f, 0.9363512f,
                                     1.2465695f, 1.6024022f, 2.0426656f, 2.6827142f};
};
template <>
struct HalfLevels<112, 5> {
  static constexpr double distortion = 0.0024439;
  static constexpr float level[16] = {0.0655230f, 0.1969354f, 0.3294618f, 0.4638960f, 0.6011142f, 0.7421218f,
                                      0.8881158f, 1.0405766f, 1.2014086f, 1.3731679f, 1.5594588f, 1.7656773f,
                                      2.0005581f, 2.2798920f, 2.6376607f, 3.1762370f};
};
template <>
struct HalfLevels<112, 6> {
  static constexpr double distortion = 0.0006279;
  static constexpr float level[32] = {0.0332062f, 0.0996662f, 0.1662693f, 0.2331127f, 0.3002959f, 0.3679222f, 0.4360996f,
                                      0.5049423f, 0.5745721f, 0.6451206f, 0.7167306f, 0.7895591f, 0.8637803f, 0.9395893f,
                                      1.0172068f, 1.0968848f, 1.1789148f, 1.2636373f, 1.3514556f, 1.4428531f, 1.5384193f,
                                      1.6388841f, 1.7451708f, 1.8584733f, 1.9803793f, 2.1130720f, 2.2596832f, 2.4249583f,
                                      2.6166433f, 2.8488225f, 3.1519281f, 3.6179225f};
};
template <>
struct HalfLevels<128, 1> {
  static constexpr double distortion = 0.3608886;
  static constexpr float level[1] = {0.7994444f};
};
template <>
struct HalfLevels<128, 2> {
  static constexpr double distortion = 0.1160001;
  static constexpr float level[2] = {0.4524532f, 1.5051930f};
};
template <>
struct HalfLevels<128, 3> {
  static constexpr double distortion = 0.0339659;
  static constexpr float level[4] = {0.2444249f, 0.7533302f, 1.3365989f, 2.1314708f};
};
template <>
struct HalfLevels<128, 4> {
  static constexpr double distortion = 0.0093148;
  static constexpr float level[8] = {0.1278731f, 0.3863809f, 0.6536189f, 0.9370970f,
                                     1.2477704f, 1.6043426f, 2.0459254f, 2.6888592f};
};
template <>
struct HalfLevels<128, 5> {
  static constexpr double distortion = 0.0024515;
  static constexpr float level[16] = {0.0655687f, 0.1970747f, 0.3297008f, 0.4642454f, 0.6015900f, 0.7427460f,
                                      0.8889180f, 1.0415966f, 1.2026994f, 1.3748017f, 1.5615362f, 1.7683439f,
                                      2.0040372f, 2.2845566f, 2.6442313f, 3.1865784f};
};
template <>
struct HalfLevels<128, 6> {
  static constexpr double distortion = 0.0006300;
  static constexpr float level[32] = {0.0332316f, 0.0997425f, 0.1663974f, 0.2332939f, 0.3005323f, 0.3682163f, 0.4364546f,
                                      0.5053621f, 0.5750616f, 0.6456851f, 0.7173765f, 0.7902940f, 0.8646129f, 0.9405296f,
                                      1.0182663f, 1.0980771f, 1.1802557f, 1.2651452f, 1.3531520f, 1.4447637f, 1.5405748f,
                                      1.6413217f, 1.7479361f, 1.8616231f, 1.9839861f, 2.1172305f, 2.2645212f, 2.4306560f,
                                      2.6234710f, 2.8572223f, 3.1627373f, 3.6332634f};
};
template <>
struct HalfLevels<192, 1> {
  static constexpr double distortion = 0.3617202;
  static constexpr float level[1] = {0.7989241f};
};
template <>
struct HalfLevels<192, 2> {
  static constexpr double distortion = 0.1164932;
  static constexpr float level[2] = {0.4525630f, 1.5069338f};
};
template <>
struct HalfLevels<192, 3> {
  static constexpr double distortion = 0.0341591;
  static constexpr float level[4] = {0.2446482f, 0.7542215f, 1.3390297f, 2.1382606f};
};
template <>
struct HalfLevels<192, 4> {
  static constexpr double distortion = 0.0093765;
  static constexpr float level[8] = {0.1280470f, 0.3869362f, 0.6546640f, 0.9388403f,
                                     1.2505802f, 1.6088871f, 2.0535693f, 2.7032963f};
};
template <>
struct HalfLevels<192, 5> {
  static constexpr double distortion = 0.0024691;
  static constexpr float level[16] = {0.0656756f, 0.1973999f, 0.3302590f, 0.4650619f, 0.6027020f, 0.7442053f,
                                      0.8907943f, 1.0439831f, 1.2057209f, 1.3786281f, 1.5664042f, 1.7745968f,
                                      2.0122016f, 2.2955138f, 2.6596859f, 3.2109509f};
};
template <>
struct HalfLevels<192, 6> {
  static constexpr double distortion = 0.0006347;
  static constexpr float level[32] = {0.0332908f, 0.0999208f, 0.1666967f, 0.2337175f, 0.3010847f, 0.3689036f, 0.4372844f,
                                      0.5063436f, 0.5762057f, 0.6470048f, 0.7188870f, 0.7920128f, 0.8665604f, 0.9427295f,
                                      1.0207459f, 1.1008682f, 1.1833952f, 1.2686765f, 1.3571260f, 1.4492409f, 1.5456275f,
                                      1.6470376f, 1.7544227f, 1.8690149f, 1.9924541f, 2.1269984f, 2.2758916f, 2.4440560f,
                                      2.6395410f, 2.8770123f, 3.1882383f, 3.6695317f};
};
template <>
struct HalfLevels<256, 1> {
  static constexpr double distortion = 0.3621356;
  static constexpr float level[1] = {0.7986641f};
};
template <>
struct HalfLevels<256, 2> {
  static constexpr double distortion = 0.1167400;
  static constexpr float level[2] = {0.4526176f, 1.5078045f};
};
template <>
struct HalfLevels<256, 3> {
  static constexpr double distortion = 0.0342560;
  static constexpr float level[4] = {0.2447598f, 0.7546674f, 1.3402473f, 2.1416686f};
};
template <>
struct HalfLevels<256, 4> {
  static constexpr double distortion = 0.0094075;
  static constexpr float level[8] = {0.1281340f, 0.3872140f, 0.6551871f, 0.9397137f,
                                     1.2519890f, 1.6111681f, 2.0574112f, 2.7105670f};
};
template <>
struct HalfLevels<256, 5> {
  static constexpr double distortion = 0.0024779;
  static constexpr float level[16] = {0.0657290f, 0.1975627f, 0.3305385f, 0.4654707f, 0.6032590f, 0.7449364f,
                                      0.8917348f, 1.0451797f, 1.2072367f, 1.3805487f, 1.5688492f, 1.7777395f,
                                      2.0163085f, 2.3010311f, 2.6674784f, 3.2232657f};
};
template <>
struct HalfLevels<256, 6> {
  static constexpr double distortion = 0.0006371;
  static constexpr float level[32] = {0.0333204f, 0.1000100f, 0.1668465f, 0.2339295f, 0.3013613f, 0.3692478f, 0.4377000f,
                                      0.5068352f, 0.5767788f, 0.6476660f, 0.7196439f, 0.7928743f, 0.8675368f, 0.9438326f,
                                      1.0219896f, 1.1022685f, 1.1849707f, 1.2704490f, 1.3591213f, 1.4514896f, 1.5481661f,
                                      1.6499104f, 1.7576842f, 1.8727330f, 1.9967155f, 2.1319167f, 2.2816201f, 2.4508117f,
                                      2.6476496f, 2.8870083f, 3.2011370f, 3.6879173f};
};
}  // namespace kvt::inline v0
