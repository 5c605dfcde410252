//! Translation between the outer address, by which a browser reaches an application, and the
//! inner address, which the application knows as its own.
//!
//! An application compares `Origin` with `Host` or `X-Forwarded-Host`, and takes a page of
//! another address for a foreign one. The outer address in a request is therefore translated
//! everywhere or nowhere, and the inner address in a response is translated back.

use axum::http::header::{
    CONTENT_LOCATION, HOST, HeaderName, LOCATION, ORIGIN, REFERER, REFRESH, SET_COOKIE,
};
use axum::http::{HeaderMap, HeaderValue};

use super::headers::{FORWARDED_HOST, FORWARDED_PROTO};

/// Outer and inner address of an application.
pub(super) struct Addresses {
    /// Host and port that the browser asks for; `None` if the request does not name them.
    outside: Option<String>,
    /// The application's port.
    port: u16,
    /// Prefix of the outer path that the application does not see. Empty, or with a slash at its
    /// beginning and none at its end.
    prefix: String,
}

impl Addresses {
    /// Returns the addresses for a request that is about to be passed on.
    pub(super) fn of(headers: &HeaderMap, port: u16, prefix: String) -> Self {
        let said = headers.get(FORWARDED_HOST).or_else(|| headers.get(HOST));
        let said = said.and_then(|host| host.to_str().ok());
        // The first proxy on the way recorded the host that the browser asked for.
        let outside = said.and_then(|hosts| hosts.split(',').next()).map(str::trim);
        let outside = outside.filter(|host| !host.is_empty()).map(str::to_owned);
        Self { outside, port, prefix }
    }

    /// Returns the inner address.
    fn inside(&self) -> String {
        format!("localhost:{}", self.port)
    }

    /// Translates the outer address in a request to the inner address.
    pub(super) fn translate_request(&self, headers: &mut HeaderMap) {
        let inside = self.inside();
        set(headers, HOST, &inside);
        if self.is_outside(headers.get(ORIGIN)) {
            set(headers, ORIGIN, &format!("http://{inside}"));
            // If these headers stayed, an application that trusts them would treat the origin as
            // foreign.
            headers.remove(FORWARDED_HOST);
            set(headers, FORWARDED_PROTO, "http");
        }
        if self.is_outside(headers.get(REFERER)) {
            let referer = headers[REFERER].to_str().unwrap_or_default();
            let path = split_url(referer).map_or("", |(_, _, path)| path);
            let path = path.strip_prefix(self.prefix.as_str()).unwrap_or(path);
            set(headers, REFERER, &format!("http://{inside}{path}"));
        }
    }

    /// Returns whether a URL begins with the outer address. The scheme is not compared, because a
    /// TLS proxy in front of the daemon may not have announced `https`.
    fn is_outside(&self, url: Option<&HeaderValue>) -> bool {
        let authority = url.and_then(|url| url.to_str().ok()).and_then(split_url);
        authority.is_some_and(|(scheme, authority, _)| self.has_outside(scheme, authority))
    }

    fn has_outside(&self, scheme: &str, authority: &str) -> bool {
        let plain = |authority: &str| {
            let port = if scheme.eq_ignore_ascii_case("https") { ":443" } else { ":80" };
            authority.strip_suffix(port).unwrap_or(authority).to_ascii_lowercase()
        };
        self.outside.as_deref().is_some_and(|outside| plain(outside) == plain(authority))
    }

    /// Translates the inner address in a response to the outer address.
    pub(super) fn translate_answer(&self, headers: &mut HeaderMap) {
        for name in [LOCATION, CONTENT_LOCATION] {
            change(headers, name, |url| self.translate_url(url));
        }
        change(headers, REFRESH, |refresh| {
            let at = refresh.to_ascii_lowercase().find("url=")? + "url=".len();
            let (before, url) = refresh.split_at(at);
            let url = url.trim_matches(['\'', '"', ' ']);
            Some(format!("{before}{}", self.translate_url(url)?))
        });
        change(headers, SET_COOKIE, |cookie| Some(self.translate_cookie(cookie)));
    }

    /// Translates a URL in a response to the outer address. Returns `None` if the URL needs no
    /// change.
    fn translate_url(&self, url: &str) -> Option<String> {
        let Some((scheme, authority, path)) = split_url(url) else {
            return url.starts_with('/').then(|| self.outside_path(url));
        };
        if self.is_inside(scheme, authority) {
            return Some(self.outside_path(path));
        }
        let is_outside = self.has_outside(scheme, authority);
        is_outside.then(|| match scheme {
            "" => format!("//{authority}{}", self.outside_path(path)),
            scheme => format!("{scheme}://{authority}{}", self.outside_path(path)),
        })
    }

    /// Returns whether this is an address that the application would use for itself.
    fn is_inside(&self, scheme: &str, authority: &str) -> bool {
        let (host, port) = match authority.rsplit_once(':') {
            Some((host, port)) if !port.contains(']') => (host, port.parse().ok()),
            _ if scheme.eq_ignore_ascii_case("https") => (authority, Some(443)),
            _ => (authority, Some(80)),
        };
        let own = ["localhost", "127.0.0.1", "[::1]", "0.0.0.0"];
        port == Some(self.port) && own.iter().any(|own| host.eq_ignore_ascii_case(own))
    }

    /// Returns the outer path for a path of the application. If the path already has the prefix,
    /// the application knows the prefix, and the path stays.
    fn outside_path(&self, path: &str) -> String {
        let path = if path.starts_with('/') { path.to_owned() } else { format!("/{path}") };
        let rest = path.strip_prefix(self.prefix.as_str());
        if rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(['/', '?', '#'])) {
            return path;
        }
        format!("{}{path}", self.prefix)
    }

    /// Limits a cookie to this application. Neither the applications beside it nor the hosts of
    /// parent domains receive the cookie.
    fn translate_cookie(&self, cookie: &str) -> String {
        let mut parts = cookie.split(';');
        let mut translated = parts.next().unwrap_or_default().to_owned();
        for part in parts {
            let (name, value) = part.split_once('=').unwrap_or((part, ""));
            match name.trim().to_ascii_lowercase().as_str() {
                "domain" => {}
                "path" if value.trim().starts_with('/') => {
                    translated += &format!("; Path={}", self.outside_path(value.trim()));
                }
                _ => translated += &format!(";{part}"),
            }
        }
        translated
    }
}

/// Splits a URL that has an authority into scheme, authority and rest. The scheme is empty if the
/// URL has none.
fn split_url(url: &str) -> Option<(&str, &str, &str)> {
    let (scheme, rest) = url.split_once("//")?;
    let scheme = match scheme {
        "" => "",
        scheme => scheme.strip_suffix(':').filter(|scheme| is_scheme(scheme))?,
    };
    let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
    Some((scheme, &rest[..end], &rest[end..]))
}

fn is_scheme(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_alphanumeric())
}

fn set(headers: &mut HeaderMap, name: HeaderName, value: &str) {
    if let Ok(value) = HeaderValue::from_str(value) {
        headers.insert(name, value);
    }
}

/// Changes all textual values of a header.
fn change(headers: &mut HeaderMap, name: HeaderName, change: impl Fn(&str) -> Option<String>) {
    let axum::http::header::Entry::Occupied(mut entry) = headers.entry(name) else { return };
    for value in entry.iter_mut() {
        let changed = value.to_str().ok().and_then(&change);
        if let Some(Ok(changed)) = changed.map(HeaderValue::try_from) {
            *value = changed;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        let pair = |(name, value): &(&'static str, &'static str)| {
            (HeaderName::from_static(name), HeaderValue::from_static(value))
        };
        pairs.iter().map(pair).collect()
    }

    fn addresses(outside: &'static str, prefix: &str) -> Addresses {
        Addresses::of(&headers(&[("host", outside)]), 8000, prefix.to_owned())
    }

    #[test]
    fn request_of_the_applications_own_page_gets_the_inner_address() {
        for (host, origin) in [
            ("web.sb.test:81", "http://web.sb.test:81"),
            ("WEB.sb.test", "https://web.sb.test"),
            ("web.sb.test:443", "https://web.sb.test"),
            ("[::1]:80", "http://[::1]"),
        ] {
            let mut all = headers(&[("x-forwarded-host", host), ("x-forwarded-proto", "https")]);
            all.insert(ORIGIN, HeaderValue::from_static(origin));
            set(&mut all, REFERER, &format!("{origin}/web/a?b"));

            Addresses::of(&all, 8000, "/web".to_owned()).translate_request(&mut all);

            let expected = headers(&[
                ("host", "localhost:8000"),
                ("origin", "http://localhost:8000"),
                ("referer", "http://localhost:8000/a?b"),
                ("x-forwarded-proto", "http"),
            ]);
            assert_eq!(all, expected, "{host}");
        }
    }

    #[test]
    fn origin_of_a_foreign_page_is_not_translated() {
        for origin in ["http://evil.test", "http://web.sb.test.evil.test", "null"] {
            let mut all = headers(&[("host", "web.sb.test"), ("x-forwarded-host", "web.sb.test")]);
            all.insert(ORIGIN, HeaderValue::from_static(origin));

            Addresses::of(&all, 8000, String::new()).translate_request(&mut all);

            assert_eq!(all[ORIGIN], origin);
            assert_eq!(all[FORWARDED_HOST], "web.sb.test");
        }
    }

    #[test]
    fn urls_in_responses_lead_back_to_the_application() {
        for (said, by_path, by_name) in [
            ("/sub/", "/web/sub/", "/sub/"),
            ("/web/sub/", "/web/sub/", "/web/sub/"),
            ("/website", "/web/website", "/website"),
            ("http://localhost:8000/x?y", "/web/x?y", "/x?y"),
            ("HTTP://LOCALHOST:8000", "/web/", "/"),
            ("https://127.0.0.1:8000?q", "/web/?q", "/?q"),
            ("//[::1]:8000/x", "/web/x", "/x"),
            ("https://out.test:81/x", "https://out.test:81/web/x", "https://out.test:81/x"),
            ("sub/", "sub/", "sub/"),
            ("?next=/a", "?next=/a", "?next=/a"),
            ("http://localhost:9000/x", "http://localhost:9000/x", "http://localhost:9000/x"),
            ("http://elsewhere.test/x", "http://elsewhere.test/x", "http://elsewhere.test/x"),
            ("mailto:a@b", "mailto:a@b", "mailto:a@b"),
        ] {
            for (prefix, expected) in [("/web", by_path), ("", by_name)] {
                let mut all = headers(&[("location", said), ("content-location", said)]);
                set(&mut all, REFRESH, &format!("5; URL='{said}'"));

                addresses("out.test:81", prefix).translate_answer(&mut all);

                assert_eq!(all[LOCATION], expected, "{said}");
                assert_eq!(all[CONTENT_LOCATION], expected, "{said}");
                let refresh = all[REFRESH].to_str().unwrap();
                let refresh = refresh.trim_start_matches("5; URL=").trim_matches('\'');
                assert_eq!(refresh, expected, "{said}");
            }
        }
    }

    #[test]
    fn cookies_are_limited_to_their_application() {
        let mut all = headers(&[
            ("set-cookie", "a=b;c; Path=/; Domain=sb.test; HttpOnly"),
            ("set-cookie", "d=e; path=/x; SameSite=Lax"),
            ("set-cookie", "f=g"),
        ]);

        addresses("out.test", "/web").translate_answer(&mut all);

        let cookies: Vec<_> = all.get_all(SET_COOKIE).iter().collect();
        assert_eq!(
            cookies,
            ["a=b;c; Path=/web/; HttpOnly", "d=e; Path=/web/x; SameSite=Lax", "f=g"]
        );
    }
}
