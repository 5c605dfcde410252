//! The agent channel on a virtio-serial port.
//!
//! The port is one byte stream that shows the presence of the host poorly: without a host, a read
//! returns 0 bytes at once and poll(2) reports a hang-up until the host is back. So a separate
//! epoll instance watches the port edge-triggered, and the runtime watches that instance: each
//! change wakes the agent once, and no state of the port keeps it busy.

mod port;

use std::cell::RefCell;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use bhatti_proto::CONTROL_PORT;
use bhatti_proto::mux::{AcceptedStream, Acceptor, read_port};
use bhatti_proto::resync::{Decoder, GENERATION, Hello};
use bytes::{Buf, BytesMut};
use futures_util::io::{AsyncRead, AsyncWrite, AsyncWriteExt};

use crate::Agent;
use crate::forward;
use crate::serve::{spawn_control, spawn_forward};
use port::Port;

/// The most that one read of the port returns: a buffer of the kernel's driver, one page.
const PORT_READ_BYTES: usize = 4096;

/// Serves the channel for as long as the guest runs.
pub(crate) async fn serve(agent: &Rc<Agent>) -> io::Result<()> {
    let channel = Rc::new(RefCell::new(Channel {
        port: Port::open()?,
        decoder: Decoder::default(),
        received: BytesMut::new(),
        hello: None,
    }));
    loop {
        let hello = std::future::poll_fn(|cx| channel.borrow_mut().poll_hello(cx)).await?;
        let mut connection = Connection(Rc::clone(&channel));
        // The ack has the host's epoch and the agent's generation: the host adapts.
        connection.write_all(&Hello { generation: GENERATION, ..hello }.encode_ack()).await?;
        let mut acceptor = Acceptor::new(connection);
        while let Some(stream) = acceptor.accept().await {
            let agent = Rc::clone(agent);
            tokio::task::spawn_local(async move { route(&agent, stream).await });
        }
    }
}

async fn route(agent: &Rc<Agent>, mut stream: AcceptedStream) {
    match read_port(&mut stream).await {
        Ok(CONTROL_PORT) => spawn_control(agent, stream),
        Ok(port) if forward::is_port(port) => spawn_forward(agent, stream),
        // Dropping the stream resets it.
        Ok(_) | Err(_) => {}
    }
}

/// The port, and the bytes that were read from it.
struct Channel {
    port: Port,
    decoder: Decoder,
    received: BytesMut,
    /// The hello that ended the last connection.
    hello: Option<Hello>,
}

impl Channel {
    /// Reads until the host sends a hello.
    fn poll_hello(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Hello>> {
        loop {
            if let Some(hello) = self.hello.take() {
                return Poll::Ready(Ok(hello));
            }
            // Bytes without a hello belong to a connection that is over.
            self.received.clear();
            match self.poll_receive(cx) {
                Poll::Ready(Ok(true)) => {}
                Poll::Ready(Ok(false)) => ready!(self.port.poll_change(cx))?,
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Pending => return Poll::Pending,
            }
        }
    }

    /// Receives bytes. Returns false if the host is not connected.
    fn poll_receive(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<bool>> {
        let mut buffer = [0; PORT_READ_BYTES];
        let length = match self.port.poll_read(cx, &mut buffer) {
            Poll::Ready(Ok(length)) => length,
            Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
            Poll::Pending => return Poll::Pending,
        };
        let mut wire = &buffer[..length];
        while let Some(hello) = self.decoder.decode(&mut wire, &mut self.received) {
            self.received.clear();
            self.hello = Some(hello);
        }
        Poll::Ready(Ok(length > 0))
    }
}

/// One connection of the channel. It ends where the next hello begins.
struct Connection(Rc<RefCell<Channel>>);

impl AsyncRead for Connection {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        let channel = &mut *self.0.borrow_mut();
        while channel.received.is_empty() {
            if channel.hello.is_some() {
                return Poll::Ready(Ok(0));
            }
            match channel.poll_receive(cx) {
                Poll::Ready(Ok(true)) => {}
                Poll::Ready(Ok(false)) => return Poll::Ready(Ok(0)),
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Pending => return Poll::Pending,
            }
        }
        if channel.hello.is_some() {
            return Poll::Ready(Ok(0));
        }
        let length = channel.received.len().min(buf.len());
        channel.received.copy_to_slice(&mut buf[..length]);
        Poll::Ready(Ok(length))
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.0.borrow_mut().port.poll_write(cx, buf)
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_close(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        // The port stays open for the next connection.
        Poll::Ready(Ok(()))
    }
}
