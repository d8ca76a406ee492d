"""How pages look: one style sheet, light and dark. No torch.

Shades differ in lightness and in one hue only, so that they keep their order for every eye and in grey; what stands on
one is black or white, whichever is further from it.
"""

_LIGHT = ("#e6eff8", "#c3daee", "#94bfe0", "#5f9fd0", "#3079b5", "#135591", "#08306b")
_DARK = ("#1d2c3b", "#234566", "#2c6290", "#4486ba", "#6ea8d6", "#a0cbec", "#d8ebfa")
NUM_SHADES = len(_LIGHT)
_BLACK, _WHITE = "#101418", "#ffffff"

_COLOURS = """
:root{color-scheme:light dark;--paper:#fdfdfb;--panel:#f4f5f3;--ink:#1d2126;--quiet:#59626d;--rule:#d9dde1;
--mark:#0b5fa5;--miss:#a8371a;--miss-paper:#fbefe9}
@media (prefers-color-scheme:dark){:root{--paper:#15181c;--panel:#1d2126;--ink:#e4e7ea;--quiet:#a0a9b3;--rule:#343a42;
--mark:#6db3ee;--miss:#f29b7c;--miss-paper:#33211b}}
"""

_PAGE = """
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif;font-variant-numeric:tabular-nums}
main{max-width:960px;margin:0 auto;padding:40px 24px 64px}
h1{font-size:28px;line-height:1.2;margin:0 0 4px;font-weight:650;overflow-wrap:anywhere}
h2{font-size:17px;margin:0 0 10px;font-weight:650}
h3{font-size:14px;margin:0 0 6px;font-weight:600}
p{margin:0 0 10px;max-width:74ch}
.lead,.note,caption,figcaption,dt,dd small{color:var(--quiet)}
.lead{margin:0;max-width:none;overflow-wrap:anywhere}.note{font-size:13px}
section{margin-top:40px;border-top:1px solid var(--rule);padding-top:18px}
.row{display:flex;flex-wrap:wrap;gap:16px 48px;align-items:flex-start}.row>*{min-width:0}
dl.headline{display:grid;grid-template-columns:repeat(auto-fit,minmax(190px,1fr));gap:22px 24px;margin:28px 0 0}
dl.headline dt{font-size:13px}
dl.headline dd{margin:0;font-size:25px;line-height:1.25;font-weight:600}
dl.headline dd small{display:block;font-size:12.5px;font-weight:400;line-height:1.4}
.table{overflow-x:auto}
table{border-collapse:collapse;font-size:13.5px;margin:0 0 8px}
th,td{padding:4px 0 4px 22px;text-align:right;white-space:nowrap;vertical-align:top}
th:first-child,td:first-child{padding-left:0}
thead th{font-weight:600;color:var(--quiet);border-bottom:1px solid var(--ink)}
tbody th{font-weight:400}tbody tr+tr>*{border-top:1px solid var(--rule)}
.l{text-align:left}.wide{white-space:normal;overflow-wrap:anywhere;min-width:16em}
.missed{color:var(--miss);font-weight:600}.kept-word{color:var(--mark);font-weight:600}
.alert{margin-top:28px;border-left:4px solid var(--miss);background:var(--miss-paper);padding:12px 18px}
.alert h2{margin-bottom:4px}.alert ul{margin:0;padding-left:18px}.alert li{overflow-wrap:anywhere}
pre{background:var(--panel);padding:12px 14px;margin:0 0 12px;overflow-x:auto;font:13px/1.5 ui-monospace,
"SFMono-Regular",Menlo,Consolas,monospace}
code{font-family:ui-monospace,"SFMono-Regular",Menlo,Consolas,monospace;font-size:.92em;overflow-wrap:anywhere}
summary{cursor:pointer;font-size:14px;margin-bottom:8px}
.drawing{overflow-x:auto;margin-bottom:6px}svg{display:block;font-family:inherit}
@media print{main{padding:0;max-width:none}section{break-inside:avoid}}
"""

_DRAWINGS = """
.ink{fill:var(--ink)}.quiet{fill:var(--quiet)}.strong{font-weight:600}
.grid,.axis,.front,.kept{fill:none}
.grid{stroke:var(--rule);stroke-width:1}.axis{stroke:var(--quiet);stroke-width:1}
.front{stroke:var(--mark);stroke-width:1.5}
.kept{stroke:var(--rule);stroke-width:1}.bar{fill:var(--mark)}
.dot{stroke-width:1.8}.on{fill:var(--mark);stroke:var(--mark)}.off{fill:var(--paper);stroke:var(--quiet)}
"""


def style_sheet() -> str:
    """Return the style of every page; it names no other file."""
    dark = f"@media (prefers-color-scheme:dark){{{_shades(_DARK)}}}"
    return f"{_COLOURS}{_PAGE}{_DRAWINGS}{_shades(_LIGHT)}\n{dark}\n"


def contrast(one: str, other: str) -> float:
    """Return the contrast of two colours as WCAG 2.1 defines it, from 1 to 21."""
    low, high = sorted((_luminance(one), _luminance(other)))
    return (high + 0.05) / (low + 0.05)


def _shades(palette: tuple[str, ...]) -> str:
    inks = (max((_BLACK, _WHITE), key=lambda ink: contrast(ink, shade)) for shade in palette)
    return "".join(
        f".h{index}{{fill:{shade}}}.t{index}{{fill:{ink}}}"
        for index, (shade, ink) in enumerate(zip(palette, inks, strict=True))
    )


def _luminance(colour: str) -> float:
    channels = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
