//! One question, one answer.

use simple_dns::rdata::{A, RData};
use simple_dns::{CLASS, Packet, PacketFlag, QTYPE, RCODE, ResourceRecord, TYPE};

use super::Names;

/// How long an answer holds, in seconds: the next sandbox of that name may have another address.
const TTL_SEC: u32 = 5;

/// What sandboxes may be called instead of by their bare name.
const SUFFIX: &str = ".sb";

/// What there is to say to a question.
pub(super) enum Answer {
    /// This.
    Known(Vec<u8>),
    /// Somebody else may know; if nobody does, this.
    Ask { failure: Vec<u8> },
}

/// Answers a question from the names of a network. What is no question gets no answer.
pub(super) fn answer(question: &[u8], names: &Names) -> Option<Answer> {
    let packet = Packet::parse(question).ok()?;
    if packet.has_flags(PacketFlag::RESPONSE) {
        return None;
    }
    let mut reply = Packet::new_reply(packet.id());
    reply.set_flags(PacketFlag::RECURSION_AVAILABLE);
    if packet.has_flags(PacketFlag::RECURSION_DESIRED) {
        reply.set_flags(PacketFlag::RECURSION_DESIRED);
    }
    let asked = packet.questions.first()?.clone();
    let name = asked.qname.to_string().to_ascii_lowercase();
    let is_ours = name.ends_with(SUFFIX);
    let address = names.get(name.strip_suffix(SUFFIX).unwrap_or(&name)).copied();
    reply.questions.push(asked.clone());
    let Some(address) = address else {
        *reply.rcode_mut() = if is_ours { RCODE::NameError } else { RCODE::ServerFailure };
        let reply = reply.build_bytes_vec().ok()?;
        return Some(if is_ours { Answer::Known(reply) } else { Answer::Ask { failure: reply } });
    };
    // Of another kind than an address of the fourth version there is nothing, and that is the answer.
    if matches!(asked.qtype, QTYPE::TYPE(TYPE::A) | QTYPE::ANY) {
        let data = RData::A(A::from(address));
        reply.answers.push(ResourceRecord::new(asked.qname, CLASS::IN, TTL_SEC, data));
    }
    reply.build_bytes_vec().ok().map(Answer::Known)
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use simple_dns::{Name, QCLASS, Question};

    use super::*;

    fn ask(name: &str, kind: TYPE) -> Option<Answer> {
        let names = Names::from([("dev".to_owned(), Ipv4Addr::new(10, 213, 0, 2))]);
        let mut packet = Packet::new_query(77);
        let name = Name::new(name).unwrap();
        packet.questions.push(Question::new(name, kind.into(), QCLASS::CLASS(CLASS::IN), false));
        answer(&packet.build_bytes_vec().unwrap(), &names)
    }

    /// The answer's code, and the addresses in it.
    fn said(answer: Option<Answer>) -> (RCODE, Vec<Ipv4Addr>, bool) {
        let (bytes, is_known) = match answer.unwrap() {
            Answer::Known(bytes) => (bytes, true),
            Answer::Ask { failure } => (failure, false),
        };
        let packet = Packet::parse(&bytes).unwrap();
        assert_eq!((packet.id(), packet.questions.len()), (77, 1));
        let address = |record: &ResourceRecord<'_>| match &record.rdata {
            RData::A(a) => Ipv4Addr::from(a.address),
            other => panic!("{other:?}"),
        };
        (packet.rcode(), packet.answers.iter().map(address).collect(), is_known)
    }

    #[test]
    fn sibling_is_known_by_its_name_in_any_case_and_has_no_other_address() {
        let address = vec![Ipv4Addr::new(10, 213, 0, 2)];
        for name in ["dev", "DEV", "dev.sb", "Dev.SB"] {
            assert_eq!(said(ask(name, TYPE::A)), (RCODE::NoError, address.clone(), true), "{name}");
            assert_eq!(said(ask(name, TYPE::AAAA)), (RCODE::NoError, vec![], true), "{name}");
        }
    }

    #[test]
    fn others_know_other_names_but_not_ours() {
        assert_eq!(said(ask("example.com", TYPE::A)), (RCODE::ServerFailure, vec![], false));
        assert_eq!(said(ask("nobody.sb", TYPE::A)), (RCODE::NameError, vec![], true));
    }

    #[test]
    fn what_is_no_question_gets_no_answer() {
        for bytes in [&b""[..], b"x", &[0; 12], &[0xff; 64]] {
            assert!(answer(bytes, &Names::new()).is_none(), "{bytes:?}");
        }
        let reply = Packet::new_reply(1).build_bytes_vec().unwrap();
        assert!(answer(&reply, &Names::new()).is_none());
    }
}
