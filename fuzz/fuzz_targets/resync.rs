//! Any bytes before a hello, in any pieces, leave the hello and what is behind it whole; any bytes before an ack, too.
#![no_main]

use bhatti_proto::resync::{Decoder, GENERATION, Hello, escape, greet};
use bytes::BytesMut;
use libfuzzer_sys::fuzz_target;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

fuzz_target!(|input: (u8, [u8; 16], &[u8], &[u8])| {
    let (piece, epoch, noise, plain) = input;
    // Whoever knows the epoch can say the ack: it is drawn at random so that nothing stale does.
    if epoch.windows(4).any(|known| noise.windows(4).any(|window| window == known)) {
        return;
    }
    let piece = usize::from(piece).max(1);
    let hello = Hello { generation: GENERATION, epoch };
    let mut wire = noise.to_vec();
    wire.extend_from_slice(&hello.encode());
    escape(plain, &mut wire);
    let (mut decoder, mut data, mut last) = (Decoder::default(), BytesMut::new(), None);
    for mut part in wire.chunks(piece) {
        while let Some(found) = decoder.decode(&mut part, &mut data) {
            data.clear();
            last = Some(found);
        }
    }
    assert_eq!((last, &data[..]), (Some(hello), plain));

    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    runtime.block_on(async {
        let (near, mut far) = tokio::io::duplex(1 << 20);
        far.write_all(&[noise, &hello.encode_ack(), plain].concat()).await.expect("there is room");
        let mut stream = greet(near, epoch).await.expect("the ack is there");
        let mut behind = vec![0; plain.len()];
        stream.read_exact(&mut behind).await.expect("what is behind it is there");
        assert_eq!(behind, plain);
    });
});
