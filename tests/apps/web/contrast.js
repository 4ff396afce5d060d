// Texts whose contrast to their background is below 4.5 (WCAG 2.2, 1.4.3): [text, contrast, colour, background]. Text that is
// hidden, disabled or covered by a picture does not count.
() => {
  const parse = (colour) => {
    const [r, g, b, a = 1] = colour.match(/[\d.]+/g).map(Number);
    return colour.startsWith("color(srgb") ? [r * 255, g * 255, b * 255, a] : [r, g, b, a];
  };
  const over = (top, under) => [0, 1, 2].map((i) => top[i] * top[3] + under[i] * (1 - top[3])).concat(1);
  const linear = (c) => ((c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  const luminance = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const chain = (element) => (element ? [element, ...chain(element.parentElement)] : []);
  const found = [];
  const check = (element, said, colour) => {
    if (!element.checkVisibility({ opacityProperty: true, visibilityProperty: true }) || element.closest(":disabled")) return;
    const box = element.getBoundingClientRect();
    if (box.width < 2 || box.height < 2) return;
    let behind = [255, 255, 255, 1], opacity = 1;
    for (const each of chain(element).reverse()) {
      const style = getComputedStyle(each);
      behind = over(parse(style.backgroundColor), behind);
      opacity *= Number(style.opacity);
    }
    const ink = parse(colour);
    const [high, low] = [luminance(over([...ink.slice(0, 3), ink[3] * opacity], behind)), luminance(behind)].sort((a, b) => b - a);
    const contrast = (high + 0.05) / (low + 0.05);
    if (contrast < 4.5) found.push([said, Math.round(contrast * 100) / 100, colour, behind.slice(0, 3).map(Math.round).join()]);
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const said = walker.currentNode.textContent.trim(), element = walker.currentNode.parentElement;
    if (said && !element.closest("script, style, noscript, option")) check(element, said.slice(0, 40), getComputedStyle(element).color);
  }
  for (const field of document.querySelectorAll("input, textarea")) {
    if (["range", "checkbox", "radio", "file", "hidden"].includes(field.type)) continue;
    const style = getComputedStyle(field, field.value ? null : "::placeholder");
    if (field.value || field.placeholder) check(field, field.value || field.placeholder, style.color);
  }
  return found;
}
