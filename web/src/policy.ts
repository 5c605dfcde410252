// The page's content security policy allows only styles that carry the nonce of this page. xterm
// creates <style> elements and `style` attributes. The elements get the nonce; the attributes are
// set by property, which the policy allows.

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
