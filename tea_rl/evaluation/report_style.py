"""Style sheet of the report page."""

STYLE = """
:root { color-scheme: light; --ink: #24292f; --soft: #57606a; --line: #e1e4e8; --tint: #f6f8fa; --blue: #1f6feb; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { margin: 0; font-size: 30px; line-height: 1.2; }
h2 { margin: 44px 0 12px; font-size: 20px; }
h3 { margin: 0 0 4px; font-size: 13px; color: var(--soft); text-transform: uppercase; letter-spacing: .05em; }
p { margin: 6px 0 12px; }
.description { color: var(--soft); font-size: 16px; }
.headline { display: flex; flex-wrap: wrap; align-items: baseline; gap: 14px; margin: 20px 0 6px; font-size: 40px;
  font-weight: 650; line-height: 1.1; font-variant-numeric: tabular-nums; }
.headline .label { font-size: 16px; font-weight: 500; color: var(--soft); }
.headline .from, .headline .arrow { color: #8b949e; }
.headline .to { color: var(--blue); }
.headline.none { font-size: 18px; color: var(--soft); }
.facts { color: var(--soft); }
img { display: block; width: 100%; height: auto; border: 1px solid var(--line); border-radius: 8px; padding: 8px; }
table { width: 100%; border-collapse: collapse; margin: 0 0 20px; }
th { text-align: left; font-weight: 600; border-bottom: 2px solid var(--line); padding: 6px 12px 6px 0; }
td { vertical-align: top; border-bottom: 1px solid var(--line); padding: 8px 12px 8px 0; overflow-wrap: anywhere; }
th:not(:first-child) { white-space: nowrap; }
.number { font-variant-numeric: tabular-nums; white-space: nowrap; width: 110px; }
.samples { table-layout: fixed; }
.samples th:first-child { width: 24%; }
.samples td { white-space: pre-wrap; }
.prompt { font-weight: 600; }
.badge { float: right; margin: 0 0 4px 10px; padding: 0 8px; border-radius: 10px; background: var(--tint);
  border: 1px solid var(--line); font-size: 13px; font-variant-numeric: tabular-nums; color: var(--soft); }
.badge.better { background: #ddf4e4; border-color: #b4e2c3; color: #116329; }
details { margin: 0 0 8px; }
summary { cursor: pointer; color: var(--blue); padding: 4px 0; }
.groups { columns: 2; column-gap: 32px; }
.group { break-inside: avoid; margin-bottom: 18px; }
.pairs { margin: 0; font-size: 13px; }
.pairs td { padding: 3px 10px 3px 0; }
.pairs td:first-child { color: var(--soft); width: 46%; }
.wide .pairs td:first-child { width: 26%; }
code { font: 12.5px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; white-space: pre-wrap; }
@media (max-width: 720px) { .groups { columns: 1; } .samples th:first-child { width: 28%; } }
"""
