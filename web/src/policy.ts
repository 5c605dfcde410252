// The page's policy lets nothing style it but what carries the nonce of this very page. xterm styles what it draws with <style> elements and
// `style` attributes that it makes itself: the first get the nonce, the second are set by property, which the policy allows.

export function styleWithinPolicy(): void {
  const nonce = document.querySelector("script")?.nonce ?? "";
  const create = document.createElement.bind(document);
  document.createElement = (tag: string, options?: ElementCreationOptions) => {
    const element = create(tag, options);
    if (element instanceof HTMLStyleElement) element.nonce = nonce;
    return element;
  };
  const set = HTMLElement.prototype.setAttribute;
  HTMLElement.prototype.setAttribute = function (name: string, value: string) {
    if (name === "style") this.style.cssText = value;
    else set.call(this, name, value);
  };
}
