//! Parses one question and builds its answer (RFC 1035).

use std::net::Ipv4Addr;

use hickory_proto::op::{Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::A;
use hickory_proto::rr::{DNSClass, RData, Record, RecordType};

use super::{Names, PrivateNames};

/// Time to live of an answer, in seconds: the next sandbox of that name may have another address.
const TTL_SEC: u32 = 5;

/// Suffix that may follow a sandbox's name.
const SUFFIX: &str = ".sb";

/// Maximum size of a question, in bytes. By RFC 9715, messages of this size fit any path.
const QUESTION_BYTES_MAX: usize = 1232;

/// Record types that ask for whole zones rather than answers: an upstream may trust this host
/// with zones that sandboxes should not get. The middle two are of mailboxes.
const TRANSFERS: [RecordType; 4] =
    [RecordType::IXFR, RecordType::AXFR, RecordType::Unknown(253), RecordType::Unknown(254)];

/// The answer to a question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// The complete reply.
    Known(Vec<u8>),
    /// No local answer: ask the upstreams, and reply with `failure` if none answers.
    Ask { failure: Vec<u8> },
}

/// A message with one plain question.
pub(super) struct Question {
    message: Message,
    asked: Query,
    /// The name, in lower case and without a dot at its end.
    name: String,
}

/// Parses a message that asks one plain question. Returns `None` for any other message.
pub(super) fn parse(message: &[u8]) -> Option<Question> {
    if message.len() > QUESTION_BYTES_MAX {
        return None;
    }
    let mut message = Message::from_vec(message).ok()?;
    let is_plain = message.metadata.message_type == MessageType::Query
        && message.metadata.op_code == OpCode::Query
        && message.queries.len() == 1
        && message.answers.is_empty()
        && message.authorities.is_empty()
        // EDNS is no additional record here.
        && message.additionals.is_empty();
    let asked = message.queries.pop().filter(|_| is_plain)?;
    let name = asked.name().to_ascii().trim_end_matches('.').to_ascii_lowercase();
    Some(Question { message, asked, name })
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
/// dot may be a public name. Returns `None` if the answer cannot be written, which a parsed
/// question rules out.
pub(super) fn answer(
    question: &Question,
    names: &Names,
    private_names: PrivateNames,
) -> Option<Answer> {
    let Question { asked, name, .. } = question;
    if TRANSFERS.contains(&asked.query_type()) {
        return reply(question, ResponseCode::Refused, None).map(Answer::Known);
    }
    let bare = name.strip_suffix(SUFFIX).unwrap_or(name);
    let is_internet = asked.query_class() == DNSClass::IN;
    match names.get(bare).filter(|_| is_internet && !bare.contains('.')) {
        None if private_names == PrivateNames::Denied && is_private(name) => {
            reply(question, ResponseCode::NXDomain, None).map(Answer::Known)
        }
        None => {
            let failure = reply(question, ResponseCode::ServFail, None)?;
            Some(Answer::Ask { failure })
        }
        // Sandboxes have only IPv4 addresses. For other types, the answer is that there are no
        // records.
        Some(address) => {
            let has_record = matches!(asked.query_type(), RecordType::A | RecordType::ANY);
            let address = has_record.then_some(*address);
            reply(question, ResponseCode::NoError, address).map(Answer::Known)
        }
    }
}

fn reply(question: &Question, code: ResponseCode, address: Option<Ipv4Addr>) -> Option<Vec<u8>> {
    let asked = &question.message.metadata;
    let mut reply = Message::response(asked.id, OpCode::Query);
    reply.metadata.recursion_desired = asked.recursion_desired;
    reply.metadata.recursion_available = true;
    reply.metadata.response_code = code;
    reply.add_query(question.asked.clone());
    reply.add_answers(address.map(|address| {
        Record::from_rdata(question.asked.name().clone(), TTL_SEC, RData::A(A(address)))
    }));
    reply.to_vec().ok()
}

#[cfg(test)]
mod tests {
    use hickory_proto::rr::Name;

    use super::*;

    fn question(name: &str, kind: RecordType) -> Vec<u8> {
        let mut message = Message::new(77, MessageType::Query, OpCode::Query);
        message.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
        message.to_vec().unwrap()
    }

    /// Returns the answer's code, its addresses, and whether it is a local answer.
    fn resolve(name: &str, kind: RecordType) -> (ResponseCode, Vec<Ipv4Addr>, bool) {
        resolve_with(name, kind, PrivateNames::Asked)
    }

    fn resolve_with(
        name: &str,
        kind: RecordType,
        private_names: PrivateNames,
    ) -> (ResponseCode, Vec<Ipv4Addr>, bool) {
        let names =
            ["dev", "github.com"].map(|name| (name.to_owned(), Ipv4Addr::new(10, 213, 0, 2)));
        let asked = question(name, kind);
        let answered = answer(&parse(&asked).unwrap(), &Names::from(names), private_names).unwrap();
        let (bytes, is_known) = match answered {
            Answer::Known(bytes) => (bytes, true),
            Answer::Ask { failure } => (failure, false),
        };
        let reply = Message::from_vec(&bytes).unwrap();
        assert_eq!((reply.metadata.id, reply.queries.len()), (77, 1));
        assert_eq!(reply.queries[0].name().to_ascii().trim_end_matches('.'), name);
        let address = |record: &Record| match &record.data {
            RData::A(A(address)) => *address,
            other => panic!("{other:?}"),
        };
        let addresses = reply.answers.iter().map(address).collect();
        (reply.metadata.response_code, addresses, is_known)
    }

    #[test]
    fn sibling_name_resolves_in_any_case_to_its_ipv4_address_only() {
        let address = vec![Ipv4Addr::new(10, 213, 0, 2)];
        for name in ["dev", "DEV", "dev.sb", "Dev.SB"] {
            assert_eq!(
                resolve(name, RecordType::A),
                (ResponseCode::NoError, address.clone(), true),
                "{name}"
            );
            assert_eq!(
                resolve(name, RecordType::AAAA),
                (ResponseCode::NoError, vec![], true),
                "{name}"
            );
        }
    }

    #[test]
    fn other_names_and_names_with_dots_are_forwarded() {
        for name in ["example.com", "nobody.sb", "github.com", "nobody"] {
            assert_eq!(
                resolve(name, RecordType::A),
                (ResponseCode::ServFail, vec![], false),
                "{name}"
            );
        }
        // Record types that this parser does not know are forwarded, too; zone transfers never
        // are.
        let of_kind = |kind: u8| {
            let mut asked = question("example.com", RecordType::A);
            let at = asked.len() - 3;
            asked[at] = kind;
            answer(&parse(&asked).unwrap(), &Names::new(), PrivateNames::Denied).unwrap()
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
            let denied = resolve_with(name, RecordType::PTR, PrivateNames::Denied);
            assert_eq!(denied, (ResponseCode::NXDomain, vec![], true), "{name}");
            let asked = resolve_with(name, RecordType::PTR, PrivateNames::Asked);
            assert_eq!(asked, (ResponseCode::ServFail, vec![], false), "{name}");
        }
        for name in
            ["example.com", "notinternal.com", "1.0.15.172.in-addr.arpa", "8.8.8.8.in-addr.arpa"]
        {
            let asked = resolve_with(name, RecordType::PTR, PrivateNames::Denied);
            assert_eq!(asked, (ResponseCode::ServFail, vec![], false), "{name}");
        }
        assert!(
            resolve_with("dev", RecordType::A, PrivateNames::Denied).2,
            "sandbox names stay known"
        );
    }

    #[test]
    fn parse_rejects_all_but_plain_questions() {
        let plain = question("dev", RecordType::A);
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
