"""Headless Chromium as a judge of a page's layout. No driver: the page measures itself and its DOM is dumped."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

from helpers import require

# Runs in the page. Boxes in CSS pixels; half a pixel of rounding is no fault.
_PROBE = r"""
(() => {
  const doc = document, faults = [], seen = {texts: 0, contrast: 21};
  const name = e => (e.tagName + ' ' + (e.textContent || '').trim().slice(0, 40));
  if (doc.documentElement.scrollWidth > window.innerWidth + 1)
    faults.push(`the page is ${doc.documentElement.scrollWidth} wide in a window of ${window.innerWidth}`);
  doc.querySelectorAll('details').forEach(d => d.open = true);
  for (const svg of doc.querySelectorAll('svg')) {
    const frame = svg.getBoundingClientRect(), boxes = [];
    for (const text of svg.querySelectorAll('text')) {
      const b = text.getBoundingClientRect();
      if (b.left < frame.left - 1 || b.right > frame.right + 1 || b.top < frame.top - 1 || b.bottom > frame.bottom + 1)
        faults.push('cut label: ' + name(text));
      for (const [o, label] of boxes)
        if (b.left < o.right - 1 && o.left < b.right - 1 && b.top < o.bottom - 2 && o.top < b.bottom - 2)
          faults.push('labels overlap: ' + name(text) + ' / ' + label);
      boxes.push([b, name(text)]);
      if (parseFloat(getComputedStyle(text).fontSize) * frame.width / svg.viewBox.baseVal.width < 11)
        faults.push('too small: ' + name(text));
    }
  }
  const flow = [...doc.querySelectorAll('h1,h2,p,nav,figcaption,figure,.scroll,.legend,details,main>section>ul')]
    .map(e => [e, e.getBoundingClientRect()]).filter(([, b]) => b.width && b.height);
  for (const [e, b] of flow) for (const [o, c] of flow)
    if (e !== o && !e.contains(o) && !o.contains(e) && b.left < c.right - 1 && c.left < b.right - 1 && b.top < c.bottom - 1 && c.top < b.bottom - 1)
      faults.push('boxes overlap: ' + name(e) + ' / ' + name(o));
  const rgb = text => {
    const srgb = text.startsWith('color(srgb'), n = text.match(/-?[\d.]+(e-?\d+)?/g).map(Number);
    return [...n.slice(0, 3).map(v => srgb ? v * 255 : v), n.length > 3 ? n[3] : 1];
  };
  const light = c => { const f = c.slice(0, 3).map(v => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
    return .2126 * f[0] + .7152 * f[1] + .0722 * f[2]; };
  const ground = e => { const layers = [];
    for (; e; e = e.parentElement) { const c = rgb(getComputedStyle(e).backgroundColor); if (c[3] > 0) layers.push(c); if (c[3] === 1) break; }
    let base = layers.length && layers[layers.length - 1][3] === 1 ? layers.pop() : [255, 255, 255, 1];
    for (const c of layers.reverse()) base = base.map((v, i) => i < 3 ? v * (1 - c[3]) + c[i] * c[3] : 1);
    return base; };
  for (const e of doc.querySelectorAll('h1,h2,p,li,th,td,caption,figcaption,summary,a,svg text')) {
    if (!(e.textContent || '').trim()) continue;
    const style = getComputedStyle(e), own = rgb(e.closest('svg') ? style.fill : style.color);
    const pair = [light(own), light(ground(e.closest('svg') || e))].sort((a, b) => b - a);
    const contrast = (pair[0] + .05) / (pair[1] + .05);
    seen.texts += 1; seen.contrast = Math.min(seen.contrast, contrast);
    if (contrast < 4.5) faults.push(`contrast ${contrast.toFixed(1)}: ` + name(e));
  }
  for (const e of doc.querySelectorAll('.scroll')) { e.focus(); if (doc.activeElement !== e) faults.push('no key reaches ' + e.getAttribute('aria-label')); }
  for (const e of doc.querySelectorAll('a[href^="#"]')) if (!doc.getElementById(e.getAttribute('href').slice(1))) faults.push('link to nowhere: ' + name(e));
  return {faults: [...new Set(faults)].slice(0, 20), dark: matchMedia('(prefers-color-scheme:dark)').matches, ...seen};
})()
"""


def chromium() -> str:
    """The browser; skips the test when there is none."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    require("chromium", found is not None, "no chromium on the PATH")
    assert found is not None
    return found


def inspect(
    pages: dict[str, str], scratch: Path, *, dark: bool, widths: tuple[int, ...] = (360, 1280)
) -> dict[str, dict[str, Any]]:
    """Faults of every page in windows of some widths ("name 360"), and a screenshot `NAME.png` of each in `scratch`."""
    frames = []
    for name, text in pages.items():
        probed = text.replace("</body>", f"<script>window.probe = () => {_PROBE.strip()};</script></body>")
        for width in widths:
            title = html.escape(f"{name} {width}")
            frames.append(
                f'<iframe title="{title}" width="{width}" height="3000" srcdoc="{html.escape(probed)}"></iframe>'
            )
    outer = scratch / "frames.html"
    outer.write_text(
        '<!DOCTYPE html><meta charset="utf-8"><style>iframe{border:0}</style><body>'
        + "".join(frames)
        + '<pre id="found"></pre>'
        "<script>onload = () => { const found = {}; for (const f of document.querySelectorAll('iframe')) found[f.title] = "
        "f.contentWindow.probe(); document.getElementById('found').textContent = JSON.stringify(found); };</script>",
        encoding="utf-8",
    )
    command = [
        chromium(), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={scratch / 'profile'}",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--window-size=1280,2000", "--virtual-time-budget=3000",
    ]  # fmt: skip
    dumped = subprocess.run(
        [*command, "--dump-dom", outer.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    found = re.search(r'<pre id="found">(.*?)</pre>', dumped.stdout, re.DOTALL)
    assert found and found[1], dumped.stderr[-2000:]
    for name, text in pages.items():
        (scratch / f"{name}.html").write_text(text, encoding="utf-8")
        shot = [*command, f"--screenshot={scratch / name}.png", (scratch / f"{name}.html").as_uri()]
        subprocess.run(shot, capture_output=True, timeout=120, check=True)
    return dict(json.loads(html.unescape(found[1])))
