//! Headers that the proxy removes, adds or changes.

use axum::http::header::{
    CONNECTION, CONTENT_SECURITY_POLICY, COOKIE, EXPECT, FORWARDED, HOST, TE, TRAILER,
    TRANSFER_ENCODING, UPGRADE,
};
use axum::http::{HeaderMap, HeaderName, HeaderValue};

use bhatti_edge::{KEY_PREFIX, TICKET_PREFIX};

/// Hop-by-hop headers, which apply to one connection (RFC 9110, 7.6.1). The proxy frames the body
/// itself, and answers `Expect: 100-continue` itself.
const HOP_BY_HOP: [HeaderName; 9] = [
    CONNECTION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-authenticate"),
    HeaderName::from_static("proxy-authorization"),
    TE,
    TRAILER,
    TRANSFER_ENCODING,
    UPGRADE,
    EXPECT,
];

const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
pub(super) const FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
pub(super) const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
const FORWARDED_PREFIX: HeaderName = HeaderName::from_static("x-forwarded-prefix");

/// Headers in which proxies describe where a request came from.
const OF_PROXIES: [HeaderName; 8] = [
    FORWARDED,
    FORWARDED_FOR,
    FORWARDED_HOST,
    FORWARDED_PROTO,
    FORWARDED_PREFIX,
    HeaderName::from_static("x-forwarded-port"),
    HeaderName::from_static("x-forwarded-server"),
    HeaderName::from_static("x-real-ip"),
];

/// Returns the protocol to switch to, if `Connection` and `Upgrade` both ask for it.
pub(super) fn upgrade(headers: &HeaderMap) -> Option<HeaderValue> {
    let wants = connection_options(headers).any(|option| option.eq_ignore_ascii_case("upgrade"));
    headers.get(UPGRADE).filter(|_| wants).cloned()
}

/// Removes the hop-by-hop headers, and those that `Connection` names.
pub(super) fn strip_hop_by_hop(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> =
        connection_options(headers).filter_map(|option| option.parse().ok()).collect();
    for name in HOP_BY_HOP.iter().chain(&named) {
        headers.remove(name);
    }
}

fn connection_options(headers: &HeaderMap) -> impl Iterator<Item = &str> {
    let values = headers.get_all(CONNECTION).into_iter();
    values.filter_map(|value| value.to_str().ok()).flat_map(|value| value.split(',').map(str::trim))
}

/// Joins the cookies of a request. HTTP/2 may send one header for each; applications that speak
/// HTTP/1.1 expect a single one (RFC 9113, section 8.2.3).
pub(super) fn join_cookies(headers: &mut HeaderMap) {
    let all: Vec<&[u8]> = headers.get_all(COOKIE).iter().map(HeaderValue::as_bytes).collect();
    if all.len() > 1
        && let Ok(joined) = HeaderValue::from_bytes(&all.join(&b"; "[..]))
    {
        headers.insert(COOKIE, joined);
    }
}

/// Removes the daemon's keys and tickets from all headers. An application's own credentials are
/// passed on.
pub(super) fn strip_credentials(headers: &mut HeaderMap) {
    let with_ours: Vec<HeaderName> = headers
        .iter()
        .filter(|(_, value)| has_ours(value.as_bytes()))
        .map(|(name, _)| name.clone())
        .collect();
    for name in with_ours {
        let cookies = (name == COOKIE).then(|| cookies_of_others(headers)).flatten();
        headers.remove(&name);
        if let Some(cookies) = cookies {
            headers.insert(COOKIE, cookies);
        }
    }
}

/// Returns whether a value contains a key or a ticket of the daemon.
fn has_ours(value: &[u8]) -> bool {
    let ours = [KEY_PREFIX, TICKET_PREFIX];
    ours.iter().any(|prefix| value.windows(prefix.len()).any(|part| part == prefix.as_bytes()))
}

/// Returns the cookies that contain no key or ticket of the daemon.
fn cookies_of_others(headers: &HeaderMap) -> Option<HeaderValue> {
    let all = headers
        .get_all(COOKIE)
        .iter()
        .flat_map(|value| value.as_bytes().split(|byte| *byte == b';'));
    let others: Vec<&[u8]> = all
        .map(<[u8]>::trim_ascii)
        .filter(|cookie| !cookie.is_empty() && !has_ours(cookie))
        .collect();
    (!others.is_empty()).then(|| HeaderValue::from_bytes(&others.join(&b"; "[..])).ok()).flatten()
}

/// Separates a guest's page from the daemon's origin, where the console keeps a key. The page
/// gets an origin of its own, its service workers control no path but their own, and the page
/// cannot clear the storage of others.
pub(super) fn confine(headers: &mut HeaderMap) {
    const OWN_ORIGIN: &str =
        "sandbox allow-downloads allow-forms allow-modals allow-popups allow-scripts";
    // Added to the application's own policy: a browser enforces all policies.
    headers.append(CONTENT_SECURITY_POLICY, HeaderValue::from_static(OWN_ORIGIN));
    for of_the_whole_origin in [
        "alt-svc",
        "clear-site-data",
        "nel",
        "report-to",
        "reporting-endpoints",
        "service-worker-allowed",
        "strict-transport-security",
    ] {
        headers.remove(of_the_whole_origin);
    }
}

/// Sets the headers that describe where a request came from. The request's own such headers are
/// trusted only if it came from this host, that is, from a proxy in front of the daemon.
/// `scheme` is that of the connection to the daemon.
pub(super) fn forward(
    headers: &mut HeaderMap,
    scheme: &'static str,
    prefix: &str,
    peer: Option<std::net::IpAddr>,
) {
    if peer.is_some_and(|peer| !peer.to_canonical().is_loopback()) {
        for name in OF_PROXIES {
            headers.remove(name);
        }
    }
    let host = headers.get(HOST).cloned();
    if let Some(host) = host.filter(|_| !headers.contains_key(FORWARDED_HOST)) {
        headers.insert(FORWARDED_HOST, host);
    }
    headers.entry(FORWARDED_PROTO).or_insert(HeaderValue::from_static(scheme));
    if let Ok(prefix) = HeaderValue::from_str(prefix) {
        headers.insert(FORWARDED_PREFIX, prefix);
    }
    if let Some(peer) = peer {
        let before: Vec<&str> =
            headers.get_all(FORWARDED_FOR).iter().filter_map(|value| value.to_str().ok()).collect();
        let chain = [before, vec![peer.to_string().as_str()]].concat().join(", ");
        if let Ok(chain) = HeaderValue::from_str(&chain) {
            headers.insert(FORWARDED_FOR, chain);
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

    #[test]
    fn hop_by_hop_headers_are_removed() {
        let mut all = headers(&[
            ("connection", "close, X-Private"),
            ("x-private", "1"),
            ("keep-alive", "1"),
            ("transfer-encoding", "chunked"),
            ("te", "trailers"),
            ("upgrade", "h2c"),
            ("expect", "100-continue"),
            ("x-public", "1"),
        ]);

        assert_eq!(upgrade(&all), None);
        strip_hop_by_hop(&mut all);

        assert_eq!(all, headers(&[("x-public", "1")]));
    }

    #[test]
    fn guest_page_is_separated_from_the_daemons_origin() {
        let mut all = headers(&[
            ("content-security-policy", "img-src 'self'"),
            ("service-worker-allowed", "/"),
            ("clear-site-data", "\"*\""),
            ("set-cookie", "a=b"),
        ]);

        confine(&mut all);

        let policies: Vec<_> = all.get_all(CONTENT_SECURITY_POLICY).iter().collect();
        assert_eq!((all.len(), policies.len()), (3, 2), "{all:?}");
        let own = policies[1].to_str().unwrap();
        assert!(own.starts_with("sandbox ") && !own.contains("same-origin"), "{own}");
    }

    #[test]
    fn upgrade_needs_both_headers() {
        let both = headers(&[("connection", "keep-alive, Upgrade"), ("upgrade", "websocket")]);

        assert_eq!(upgrade(&both), Some(HeaderValue::from_static("websocket")));
    }

    #[test]
    fn our_credentials_are_removed_and_the_applications_are_kept() {
        let mut ours = headers(&[
            ("authorization", "Bearer bht_0123"),
            ("referer", "http://x/?token=bht-ticket_0123"),
            ("x-anything", "bht_0123"),
            ("cookie", "k=bht_0123"),
        ]);
        let mut cookies = headers(&[("cookie", "a=b; k=bht_0123; c=d")]);
        let mut theirs = headers(&[("authorization", "Basic dXNlcjpwYXNz")]);

        strip_credentials(&mut ours);
        strip_credentials(&mut theirs);
        strip_credentials(&mut cookies);

        assert_eq!(cookies[COOKIE], "a=b; c=d");
        assert!(ours.is_empty() && theirs.contains_key("authorization"));
    }

    #[test]
    fn cookies_that_came_apart_are_joined() {
        let mut all = HeaderMap::new();
        for cookie in ["a=1", "b=2; c=3"] {
            all.append(COOKIE, HeaderValue::from_static(cookie));
        }
        for _ in 0..2 {
            join_cookies(&mut all);
            let cookies: Vec<_> = all.get_all(COOKIE).iter().collect();
            assert_eq!(cookies, ["a=1; b=2; c=3"]);
        }
    }

    #[test]
    fn forwarded_headers_describe_the_origin_of_a_request() {
        let mut all = headers(&[("host", "box:8080"), ("x-forwarded-for", "10.0.0.1")]);

        forward(&mut all, "http", "/p", Some("127.0.0.1".parse().unwrap()));

        let expected = headers(&[
            ("host", "box:8080"),
            ("x-forwarded-for", "10.0.0.1, 127.0.0.1"),
            ("x-forwarded-host", "box:8080"),
            ("x-forwarded-proto", "http"),
            ("x-forwarded-prefix", "/p"),
        ]);
        assert_eq!(all, expected);
    }

    #[test]
    fn forwarded_headers_of_a_remote_peer_are_replaced() {
        let mut all = headers(&[
            ("host", "box:8080"),
            ("forwarded", "for=10.0.0.1"),
            ("x-real-ip", "10.0.0.1"),
            ("x-forwarded-for", "10.0.0.1"),
            ("x-forwarded-host", "evil.test"),
            ("x-forwarded-proto", "ftp"),
        ]);

        forward(&mut all, "https", "", Some("192.0.2.7".parse().unwrap()));

        let expected = headers(&[
            ("host", "box:8080"),
            ("x-forwarded-for", "192.0.2.7"),
            ("x-forwarded-host", "box:8080"),
            ("x-forwarded-proto", "https"),
            ("x-forwarded-prefix", ""),
        ]);
        assert_eq!(all, expected);
    }
}
