"""The page around the report's sections, and its style sheet: light or dark, wide or narrow."""

from __future__ import annotations

# The policy forbids scripts and anything from outside, whatever text a run brings along.
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
<header><h1>{title}</h1><dl>{facts}</dl></header>
{body}
</main>
</body>
</html>
"""

STYLE = """
:root {
  color-scheme: light dark;
  --ground: #ffffff; --panel: #f6f7f9; --line: #d9dde3; --text: #1c2128; --soft: #5b6572;
  --c0: #2f6feb; --c1: #d9730d; --c2: #1a8f5a; --c3: #a13bb8; --c4: #c62f3d; --c5: #6b6f1d;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #14171b; --panel: #1c2026; --line: #343b45; --text: #e4e8ee; --soft: #98a2b0;
    --c0: #6ea0ff; --c1: #f0a050; --c2: #4fc98f; --c3: #d38be8; --c4: #ff7b83; --c5: #c3c860;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--ground); color: var(--text);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "PingFang SC",
    "Microsoft YaHei", "Noto Sans CJK SC", sans-serif;
}
main { max-width: 1160px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 1.8rem; line-height: 1.2; margin: 0 0 20px; overflow-wrap: anywhere; }
h2 {
  font-size: 1.2rem; margin: 44px 0 14px; padding-bottom: 6px;
  border-bottom: 1px solid var(--line);
}
h3 { font-size: 1rem; margin: 20px 0 6px; }
dl {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr));
  gap: 14px 24px; margin: 0;
}
dl .wide { grid-column: 1 / -1; }
dt { color: var(--soft); font-size: .8rem; }
dd { margin: 0; overflow-wrap: anywhere; }
figure { margin: 0 0 16px; }
figcaption { font-weight: 600; font-size: .95rem; margin-bottom: 6px; }
img {
  display: block; width: min(var(--width), max(100%, 640px)); height: auto;
  border: 1px solid var(--line); border-radius: 6px;
}
.scroll { overflow-x: auto; }
.charts {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(min(320px, 100%), 1fr));
  gap: 16px;
}
.charts figure {
  background: var(--panel); border: 1px solid var(--line); border-radius: 8px;
  padding: 12px; margin: 0;
}
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--soft); font-size: 11px; text-anchor: middle; }
svg text.y { text-anchor: end; }
svg .grid { stroke: var(--line); stroke-width: 1; }
polyline { fill: none; stroke: var(--c); stroke-width: 1.8; stroke-linejoin: round; }
circle { fill: var(--c); }
.faint { --c: var(--c0); opacity: .35; stroke-width: 1; }
.c0 { --c: var(--c0); } .c1 { --c: var(--c1); } .c2 { --c: var(--c2); }
.c3 { --c: var(--c3); } .c4 { --c: var(--c4); } .c5 { --c: var(--c5); }
.legend { margin: 6px 0 0; font-size: .8rem; color: var(--soft); }
.key { display: inline-block; margin-right: 14px; }
.key::before {
  content: ""; display: inline-block; width: 14px; height: 3px; margin-right: 5px;
  vertical-align: middle; background: var(--c);
}
table { border-collapse: collapse; font-size: .9rem; }
th, td {
  text-align: left; vertical-align: top; padding: 4px 16px 4px 0;
  border-bottom: 1px solid var(--line);
}
th { color: var(--soft); font-weight: 500; }
td { overflow-wrap: anywhere; }
td:first-child { min-width: 7em; }
td.number { text-align: right; min-width: 0; font-variant-numeric: tabular-nums; }
pre, .options table { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre {
  background: var(--panel); border: 1px solid var(--line); border-radius: 8px; padding: 14px;
  overflow-x: auto; font-size: .85rem; line-height: 1.5;
}
.options { columns: 340px auto; column-gap: 32px; }
.options { margin-top: 12px; }
.options > div { break-inside: avoid; padding-bottom: 20px; }
.options h3 { margin-top: 0; }
.options table { font-size: .8rem; }
details { margin-bottom: 28px; }
summary { cursor: pointer; color: var(--c0); }
"""
