use proptest::prelude::*;

use super::*;

fn encoded(frame_type: FrameType, payload: &[u8]) -> Vec<u8> {
    let mut buffer = Vec::new();
    encode(&mut buffer, frame_type, payload).unwrap();
    buffer
}

fn unhex(text: &str) -> Vec<u8> {
    text.split(' ').map(|byte| u8::from_str_radix(byte, 16).unwrap()).collect()
}

#[test]
fn frames_are_those_of_the_original_system() {
    let table: &[(FrameType, &[u8], &str)] = &[
        (
            FrameType::EXEC_REQ,
            br#"{"argv":["echo","hi"]}"#,
            "00 00 00 17 10 7b 22 61 72 67 76 22 3a 5b 22 65 63 68 6f 22 2c 22 68 69 22 5d 7d",
        ),
        (FrameType::STDOUT, b"hi\n", "00 00 00 04 02 68 69 0a"),
        (FrameType::EXIT, &exit_payload(0), "00 00 00 05 05 00 00 00 00"),
        (FrameType::EXIT, &exit_payload(-1), "00 00 00 05 05 ff ff ff ff"),
        (FrameType::EXIT, &exit_payload(143), "00 00 00 05 05 00 00 00 8f"),
        (FrameType::RESIZE, &resize_payload(40, 120), "00 00 00 05 04 00 28 00 78"),
        (FrameType::KILL, b"", "00 00 00 01 07"),
        (FrameType::AUTH, b"abc", "00 00 00 04 11 61 62 63"),
        (
            FrameType::FWD_REQ,
            br#"{"port":8080}"#,
            "00 00 00 0e 20 7b 22 70 6f 72 74 22 3a 38 30 38 30 7d",
        ),
    ];

    for (frame_type, payload, hex) in table {
        assert_eq!(encoded(*frame_type, payload), unhex(hex), "{frame_type}");
    }
}

#[test]
fn largest_payload_passes_both_ways() {
    let payload = vec![7; PAYLOAD_BYTES_MAX];

    let buffer = encoded(FrameType::STDOUT, &payload);

    let parsed = parse(&buffer).unwrap().unwrap();
    assert_eq!((parsed.payload, parsed.total_bytes), (&payload[..], buffer.len()));
}

#[test]
fn larger_payload_is_refused_and_not_written() {
    let mut buffer = vec![1, 2, 3];

    let refused = encode(&mut buffer, FrameType::STDOUT, &vec![0; PAYLOAD_BYTES_MAX + 1]);

    let error = FrameError::TooLarge { length: FRAME_BYTES_MAX + 1 };
    assert_eq!(refused, Err(error));
    assert_eq!(error.to_string(), "frame too large: 1048577 > 1048576");
    assert_eq!(buffer, [1, 2, 3]);
}

#[test]
fn impossible_lengths_are_refused_at_the_header() {
    assert_eq!(parse(&[0, 0, 0, 0]), Err(FrameError::Empty));
    assert_eq!(parse(&[0, 0x20, 0, 0]), Err(FrameError::TooLarge { length: 2 << 20 }));
    assert_eq!(parse(&[0xff; 4]), Err(FrameError::TooLarge { length: u32::MAX as usize }));
}

#[test]
fn incomplete_frame_asks_for_more() {
    let buffer = encoded(FrameType::STDERR, b"abc");

    for end in 0..buffer.len() {
        assert_eq!(parse(&buffer[..end]), Ok(None), "{end} bytes");
    }
}

#[test]
fn bytes_after_a_frame_are_not_consumed() {
    let mut buffer = encoded(FrameType::STDOUT, b"x");
    buffer.extend_from_slice(b"next");

    let parsed = parse(&buffer).unwrap().unwrap();

    assert_eq!(
        (parsed.frame_type, parsed.payload, parsed.total_bytes),
        (FrameType::STDOUT, &b"x"[..], 6)
    );
}

#[test]
fn resize_survives_its_edges() {
    for (rows, cols) in [(24, 80), (0, 0), (u16::MAX, u16::MAX)] {
        assert_eq!(parse_resize(&resize_payload(rows, cols)), Some((rows, cols)));
    }
    assert_eq!(parse_resize(&[0, 1]), None);
    assert_eq!(parse_resize(&[0, 1, 0, 2, 9]), Some((1, 2)));
}

#[test]
fn exit_survives_its_edges() {
    for code in [0, 1, -1, 127, 137, 143, i32::MIN, i32::MAX] {
        assert_eq!(parse_exit(&exit_payload(code)), Some(code));
    }
    assert_eq!(parse_exit(&[0]), None);
    assert_eq!(parse_exit(&[0, 0, 0, 3, 9]), Some(3));
}

proptest! {
    #[test]
    fn any_frame_survives(frame_type: u8, payload: Vec<u8>) {
        let buffer = encoded(FrameType(frame_type), &payload);
        let parsed = parse(&buffer).unwrap().unwrap();
        prop_assert_eq!(parsed.frame_type, FrameType(frame_type));
        prop_assert_eq!(parsed.payload, &payload[..]);
        prop_assert_eq!(parsed.total_bytes, buffer.len());
    }

    #[test]
    fn no_bytes_make_the_parser_panic(bytes: Vec<u8>) {
        if let Ok(Some(parsed)) = parse(&bytes) {
            prop_assert!(parsed.total_bytes <= bytes.len());
        }
    }
}
