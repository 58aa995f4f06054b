#!/usr/bin/env python3
# SPDX-FileCopyrightText: kvtailor contributors
# SPDX-License-Identifier: Apache-2.0
"""The English prose of Debian's administration handbook as plain ASCII text, in the order of its table of contents.
Listings are left out: a terminal session is another kind of text.

  tools/handbook.py FOLDER_OF_HTML_PAGES > handbook.txt
"""
import html
import pathlib
import re
import sys

folder = pathlib.Path(sys.argv[1])
index = (folder / "index.html").read_text(encoding="utf-8")
names = dict.fromkeys(re.findall(r'href="([^"#]+\.html)', index))
pages = []
for name in names:
    if not (folder / name).is_file():
        continue
    page = (folder / name).read_text(encoding="utf-8")
    page = re.sub(r'(?s)<(script|style|head|pre).*?</\1>|<ul class="docnav".*?</ul>', "", page)
    page = re.sub(r"<(p|div|h\d|li|br|tr|dt|dd)[^>]*>", "\n", page)
    page = html.unescape(re.sub(r"<[^>]+>", "", page))
    pages.append(re.sub(r"\n\s*\n+", "\n\n", re.sub(r"[ \t]+", " ", page)).strip())
sys.stdout.write("\n\n".join(pages).encode("ascii", "ignore").decode())
