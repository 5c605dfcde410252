//! Any bytes decode to frames or an error, and the result is the same for any split of the bytes.
#![no_main]

use bhatti_proto::{FrameReader, encode, parse};
use libfuzzer_sys::fuzz_target;
use tokio::io::AsyncWriteExt;

fuzz_target!(|input: (u8, &[u8])| {
    let (piece, bytes) = input;
    let mut whole = Vec::new();
    let mut rest = bytes;
    while let Ok(Some(parsed)) = parse(rest) {
        assert!(parsed.total_bytes <= rest.len());
        let mut again = Vec::new();
        encode(&mut again, parsed.frame_type, parsed.payload).expect("a parsed frame can be encoded");
        assert_eq!(again, rest[..parsed.total_bytes]);
        whole.push((parsed.frame_type.0, parsed.payload.to_vec()));
        rest = &rest[parsed.total_bytes..];
    }
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("the runtime can be built");
    let pieces = runtime.block_on(async {
        let (mut near, far) = tokio::io::duplex(usize::from(piece).max(1));
        let bytes = bytes.to_vec();
        let writing = tokio::spawn(async move { drop(near.write_all(&bytes).await) });
        let (mut reader, mut frames) = (FrameReader::new(far), Vec::new());
        while let Ok(Some(frame)) = reader.next().await {
            frames.push((frame.frame_type.0, frame.payload.to_vec()));
        }
        drop(reader);
        writing.await.expect("the writer ends");
        frames
    });
    assert_eq!(pieces, whole);
});
