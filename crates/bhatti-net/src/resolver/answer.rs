//! Parses one question and builds its answer: RFC 1035, section 4. Reads only the header and the
//! question; the upstream interprets the rest.

use std::net::Ipv4Addr;

use super::{Names, PrivateNames};

/// Time to live of an answer, in seconds: the next sandbox of that name may have another address.
const TTL_SEC: u32 = 5;

/// Suffix that may follow a sandbox's name.
const SUFFIX: &str = ".sb";

/// Maximum size of a question, in bytes. By RFC 9715, messages of this size fit any path.
const QUESTION_BYTES_MAX: usize = 1232;

const HEADER_BYTES: usize = 12;
const NAME_BYTES_MAX: usize = 255;
const LABEL_BYTES_MAX: u8 = 63;

/// Flags in the header: response, operation code, recursion desired, recursion available.
const RESPONSE: u16 = 0x8000;
const OPCODE: u16 = 0x7800;
const RECURSION_DESIRED: u16 = 0x0100;
const RECURSION_AVAILABLE: u16 = 0x0080;

const NO_ERROR: u16 = 0;
const SERVER_FAILURE: u16 = 2;
const NO_SUCH_NAME: u16 = 3;
const REFUSED: u16 = 5;

const ADDRESS: u16 = 1;
const ANY: u16 = 255;
/// Record types that ask for whole zones rather than answers: an upstream may trust this host
/// with zones that sandboxes should not get.
const TRANSFERS: [u16; 4] = [251, 252, 253, 254];
const INTERNET: u16 = 1;
/// A pointer to the name of the question, which begins right after the header.
const SAME_NAME: u16 = 0xc000 | 12;

/// The answer to a question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// The complete reply.
    Known(Vec<u8>),
    /// No local answer: ask the upstreams, and reply with `failure` if none answers.
    Ask { failure: Vec<u8> },
}

/// A parsed question.
pub(super) struct Question<'a> {
    id: u16,
    recursion_desired: bool,
    /// The name, in lower case.
    name: String,
    kind: u16,
    class: u16,
    /// Name, type and class as received.
    bytes: &'a [u8],
}

/// Parses a message that asks one plain question. Returns `None` for any other message.
pub(super) fn parse(message: &[u8]) -> Option<Question<'_>> {
    if message.len() > QUESTION_BYTES_MAX {
        return None;
    }
    let number = |at: usize| Some(u16::from_be_bytes(*message.get(at..)?.first_chunk()?));
    let flags = number(2)?;
    let is_plain = flags & (RESPONSE | OPCODE) == 0;
    // One question, no answers, no authority records, and at most one additional record (EDNS).
    let counts = (number(4)?, number(6)?, number(8)?);
    if !is_plain || counts != (1, 0, 0) || number(10)? > 1 {
        return None;
    }
    let (name, after) = parse_name(message)?;
    let bytes = message.get(HEADER_BYTES..after + 4)?;
    Some(Question {
        id: number(0)?,
        recursion_desired: flags & RECURSION_DESIRED != 0,
        name,
        kind: number(after)?,
        class: number(after + 2)?,
        bytes,
    })
}

/// Parses the name after the header, and returns its end. In a question there is no earlier name
/// that a pointer could refer to.
fn parse_name(message: &[u8]) -> Option<(String, usize)> {
    let (mut name, mut at) = (String::new(), HEADER_BYTES);
    loop {
        let length = *message.get(at)?;
        at += 1;
        if length == 0 {
            return Some((name, at));
        }
        let label = message.get(at..at + usize::from(length))?;
        at += usize::from(length);
        if length > LABEL_BYTES_MAX || at - HEADER_BYTES > NAME_BYTES_MAX {
            return None;
        }
        if !name.is_empty() {
            name.push('.');
        }
        name.push_str(&String::from_utf8_lossy(label).to_ascii_lowercase());
    }
}

/// Zones of private networks, by RFC 6762, RFC 8375, RFC 9476 and ICANN's reservation of
/// `internal`, and the reverse zones of private and link-local addresses (RFC 6303).
const PRIVATE_ZONES: [&str; 12] = [
    "internal",
    "local",
    "localdomain",
    "lan",
    "home.arpa",
    "10.in-addr.arpa",
    "127.in-addr.arpa",
    "254.169.in-addr.arpa",
    "168.192.in-addr.arpa",
    "c.f.ip6.arpa",
    "d.f.ip6.arpa",
    "e.f.ip6.arpa",
];

/// Whether a name has a meaning only in a private network.
fn is_private(name: &str) -> bool {
    let is_in = |zone: &str| {
        name.strip_suffix(zone).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
    };
    let is_of_172 = || {
        let second =
            name.strip_suffix(".172.in-addr.arpa").and_then(|rest| rest.rsplit('.').next());
        second
            .and_then(|octet| octet.parse().ok())
            .is_some_and(|octet: u8| (16..32).contains(&octet))
    };
    // The root has no dot either, but it is not a private name.
    (!name.contains('.') && !name.is_empty()) || PRIVATE_ZONES.into_iter().any(is_in) || is_of_172()
}

/// Answers a question from the names of a network. Only names without a dot match: a name with a
/// dot may be a public name.
pub(super) fn answer(
    question: &Question<'_>,
    names: &Names,
    private_names: PrivateNames,
) -> Answer {
    if TRANSFERS.contains(&question.kind) {
        return Answer::Known(reply(question, REFUSED, None));
    }
    let bare = question.name.strip_suffix(SUFFIX).unwrap_or(&question.name);
    let known = names.get(bare).filter(|_| question.class == INTERNET && !bare.contains('.'));
    match known {
        None if private_names == PrivateNames::Denied && is_private(&question.name) => {
            Answer::Known(reply(question, NO_SUCH_NAME, None))
        }
        None => Answer::Ask { failure: reply(question, SERVER_FAILURE, None) },
        // Sandboxes have only IPv4 addresses. For other types, the answer is that there are no
        // records.
        Some(address) => {
            let asked = matches!(question.kind, ADDRESS | ANY);
            Answer::Known(reply(question, NO_ERROR, asked.then_some(*address)))
        }
    }
}

fn reply(question: &Question<'_>, code: u16, address: Option<Ipv4Addr>) -> Vec<u8> {
    let desired = if question.recursion_desired { RECURSION_DESIRED } else { 0 };
    let flags = RESPONSE | RECURSION_AVAILABLE | desired | code;
    let answers = u16::from(address.is_some());
    let mut reply = Vec::with_capacity(HEADER_BYTES + question.bytes.len() + 16);
    for number in [question.id, flags, 1, answers, 0, 0] {
        reply.extend_from_slice(&number.to_be_bytes());
    }
    reply.extend_from_slice(question.bytes);
    if let Some(address) = address {
        for number in [SAME_NAME, ADDRESS, INTERNET] {
            reply.extend_from_slice(&number.to_be_bytes());
        }
        reply.extend_from_slice(&TTL_SEC.to_be_bytes());
        reply.extend_from_slice(&4u16.to_be_bytes());
        reply.extend_from_slice(&address.octets());
    }
    reply
}

#[cfg(test)]
mod tests {
    use simple_dns::rdata::RData;
    use simple_dns::{CLASS, Name, Packet, QCLASS, RCODE, TYPE};

    use super::*;

    fn question(name: &str, kind: TYPE) -> Vec<u8> {
        let mut packet = Packet::new_query(77);
        let (name, class) = (Name::new(name).unwrap(), QCLASS::CLASS(CLASS::IN));
        packet.questions.push(simple_dns::Question::new(name, kind.into(), class, false));
        packet.build_bytes_vec().unwrap()
    }

    /// Returns the answer's code, its addresses, and whether it is a local answer.
    fn said(name: &str, kind: TYPE) -> (RCODE, Vec<Ipv4Addr>, bool) {
        said_with(name, kind, PrivateNames::Asked)
    }

    fn said_with(
        name: &str,
        kind: TYPE,
        private_names: PrivateNames,
    ) -> (RCODE, Vec<Ipv4Addr>, bool) {
        let names =
            ["dev", "github.com"].map(|name| (name.to_owned(), Ipv4Addr::new(10, 213, 0, 2)));
        let asked = question(name, kind);
        let answered = answer(&parse(&asked).unwrap(), &Names::from(names), private_names);
        let (bytes, is_known) = match answered {
            Answer::Known(bytes) => (bytes, true),
            Answer::Ask { failure } => (failure, false),
        };
        let packet = Packet::parse(&bytes).unwrap();
        assert_eq!((packet.id(), packet.questions.len()), (77, 1));
        assert_eq!(packet.questions[0].qname.to_string(), name);
        let address = |record: &simple_dns::ResourceRecord<'_>| match &record.rdata {
            RData::A(a) => Ipv4Addr::from(a.address),
            other => panic!("{other:?}"),
        };
        (packet.rcode(), packet.answers.iter().map(address).collect(), is_known)
    }

    #[test]
    fn sibling_name_resolves_in_any_case_to_its_ipv4_address_only() {
        let address = vec![Ipv4Addr::new(10, 213, 0, 2)];
        for name in ["dev", "DEV", "dev.sb", "Dev.SB"] {
            assert_eq!(said(name, TYPE::A), (RCODE::NoError, address.clone(), true), "{name}");
            assert_eq!(said(name, TYPE::AAAA), (RCODE::NoError, vec![], true), "{name}");
        }
    }

    #[test]
    fn other_names_and_names_with_dots_are_forwarded() {
        for name in ["example.com", "nobody.sb", "github.com", "nobody"] {
            assert_eq!(said(name, TYPE::A), (RCODE::ServerFailure, vec![], false), "{name}");
        }
        // Record types that this parser does not know are forwarded, too; zone transfers never
        // are.
        let of_kind = |kind: u8| {
            let mut asked = question("example.com", TYPE::A);
            let at = asked.len() - 3;
            asked[at] = kind;
            answer(&parse(&asked).unwrap(), &Names::new(), PrivateNames::Denied)
        };
        assert!(matches!(of_kind(44), Answer::Ask { failure } if failure[3] & 15 == 2));
        assert!(matches!(of_kind(252), Answer::Known(refusal) if refusal[3] & 15 == 5));
    }

    #[test]
    fn private_names_do_not_exist_unless_they_are_forwarded() {
        let private = [
            "printer",
            "wpad",
            "db.corp.internal",
            "INTERNAL",
            "host.local",
            "router.home.arpa",
            "5.1.168.192.in-addr.arpa",
            "9.0.0.10.in-addr.arpa",
            "1.0.31.172.in-addr.arpa",
            "254.169.in-addr.arpa",
            "1.0.c.f.ip6.arpa",
        ];
        for name in private {
            let denied = said_with(name, TYPE::PTR, PrivateNames::Denied);
            assert_eq!(denied, (RCODE::NameError, vec![], true), "{name}");
            let asked = said_with(name, TYPE::PTR, PrivateNames::Asked);
            assert_eq!(asked, (RCODE::ServerFailure, vec![], false), "{name}");
        }
        for name in
            ["example.com", "notinternal.com", "1.0.15.172.in-addr.arpa", "8.8.8.8.in-addr.arpa"]
        {
            let asked = said_with(name, TYPE::PTR, PrivateNames::Denied);
            assert_eq!(asked, (RCODE::ServerFailure, vec![], false), "{name}");
        }
        assert!(said_with("dev", TYPE::A, PrivateNames::Denied).2, "sandbox names stay known");
    }

    #[test]
    fn parse_rejects_all_but_plain_questions() {
        let plain = question("dev", TYPE::A);
        assert!(parse(&plain).is_some());
        let with = |at: usize, byte: u8| {
            let mut message = plain.clone();
            message[at] = byte;
            message
        };
        // An answer, an update, two questions, an answer in it, two additional records, a
        // compressed name.
        for message in
            [with(2, 0x80), with(2, 0x28), with(5, 2), with(7, 1), with(11, 2), with(12, 0xc0)]
        {
            assert!(parse(&message).is_none(), "{message:?}");
        }
        for bytes in [&b""[..], b"x", &[0; 12], &[0xff; 64], &[1; 300], &[0; 5000]] {
            assert!(parse(bytes).is_none(), "{bytes:?}");
        }
        for length in 0..plain.len() {
            assert!(parse(&plain[..length]).is_none(), "{length}");
        }
    }
}
