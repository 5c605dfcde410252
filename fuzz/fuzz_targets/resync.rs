//! A hello and the data after it decode unchanged after any bytes, in any split. The same holds for
//! an ack.
#![no_main]

use bhatti_proto::resync::{Decoder, GENERATION, Hello, escape, greet};
use bytes::BytesMut;
use libfuzzer_sys::fuzz_target;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

fuzz_target!(|input: (u8, [u8; 16], &[u8], &[u8])| {
    let (piece, epoch, noise, plain) = input;
    // Noise with a part of the epoch can forge an ack. A real epoch is random, so stale bytes lack
    // it.
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

    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("the runtime can be built");
    runtime.block_on(async {
        let (near, mut far) = tokio::io::duplex(1 << 20);
        far.write_all(&[noise, &hello.encode_ack(), plain].concat()).await.expect("the pipe has room");
        let mut stream = greet(near, epoch).await.expect("the ack is found");
        let mut behind = vec![0; plain.len()];
        stream.read_exact(&mut behind).await.expect("the data after the ack arrives");
        assert_eq!(behind, plain);
    });
});
