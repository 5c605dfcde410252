//! Records when a guest was last heard. A guest that answers other requests is busy, however long
//! this answer takes. A guest that sends nothing at all hangs.

use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::{Instant, timeout_at};

use crate::CallError;

/// The factor by which a busy guest gets more time than a silent one. This factor keeps the start
/// of a command and a request below 90 s. After 90 s the daemon drops a WebSocket that it has not
/// read from.
const BUSY_FACTOR: u32 = 4;

/// The time of the last frame from the guest, on any stream. Bytes of a forwarded port do not
/// count.
#[derive(Clone, Debug, Default)]
pub(crate) struct Heard(Arc<Mutex<Option<Instant>>>);

impl Heard {
    /// Records that the guest sent a frame just now.
    pub(crate) fn note(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
    }

    fn last(&self) -> Option<Instant> {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for an answer: for `limit` after the guest was last heard, and for at most
    /// [`BUSY_FACTOR`] times `limit` in all.
    ///
    /// # Errors
    ///
    /// Returns [`CallError::Silent`] if the guest sent nothing for `limit`, [`CallError::Busy`]
    /// if it answered only other requests, or the answer's own error.
    pub(crate) async fn within<T>(
        &self,
        limit: Duration,
        answer: impl Future<Output = Result<T, CallError>>,
    ) -> Result<T, CallError> {
        let began = Instant::now();
        let mut deadline = began + limit;
        let mut answer = pin!(answer);
        loop {
            if let Ok(answered) = timeout_at(deadline, answer.as_mut()).await {
                return answered;
            }
            let last = began + limit * BUSY_FACTOR;
            let later = self.last().map_or(deadline, |heard| heard + limit);
            if later <= deadline {
                return Err(CallError::Silent { limit });
            }
            if deadline >= last {
                return Err(CallError::Busy { waited: limit * BUSY_FACTOR });
            }
            deadline = later.min(last);
        }
    }
}

#[cfg(test)]
mod tests {
    use async_trait::async_trait;
    use bhatti_engine::{AgentChannel, AgentStream, ChannelError};
    use bhatti_proto::{ExecRequest, FrameReader, FrameType, FrameWriter};
    use tokio::io::{duplex, split};
    use tokio::time::sleep;

    use super::*;
    use crate::AgentClient;

    const LIMIT: Duration = Duration::from_secs(15);

    /// A guest that starts commands after `starts_after`, and answers everything else at once.
    struct Slow {
        starts_after: Duration,
    }

    #[async_trait]
    impl AgentChannel for Slow {
        async fn open(&self, _port: u32) -> Result<Box<dyn AgentStream>, ChannelError> {
            let (ours, theirs) = duplex(4096);
            let starts_after = self.starts_after;
            tokio::spawn(async move {
                let (reader, writer) = split(theirs);
                let (mut reader, mut writer) = (FrameReader::new(reader), FrameWriter::new(writer));
                while let Ok(Some(frame)) = reader.next().await {
                    let answered = match frame.frame_type {
                        FrameType::EXEC_REQ => {
                            sleep(starts_after).await;
                            writer.send(FrameType::STARTED, b"").await
                        }
                        FrameType::EXEC_LIST_REQ => {
                            writer.send(FrameType::EXEC_LIST_RESP, b"[]").await
                        }
                        _ => Ok(()),
                    };
                    if answered.is_err() {
                        break;
                    }
                }
            });
            Ok(Box::new(ours))
        }
    }

    /// Starts a command, and returns the result and the time that it took. Another client sends a
    /// request every `others`, if given.
    async fn start(
        starts_after: Duration,
        others: Option<Duration>,
    ) -> (Result<(), CallError>, Duration) {
        let client = AgentClient::new(Arc::new(Slow { starts_after })).with_token(b"token");
        let other = client.clone().with_token(b"other");
        let began = Instant::now();
        let start = async {
            let (_input, mut output) = client.exec(ExecRequest::default()).await?;
            output.started(LIMIT).await
        };
        let ask = async {
            loop {
                sleep(others.unwrap_or(Duration::MAX)).await;
                other.list_sessions().await.unwrap();
            }
        };
        tokio::select! {
            started = start => (started, began.elapsed()),
            () = ask => unreachable!("the other client asks forever"),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn guest_that_answers_other_requests_gets_more_time() {
        let (started, took) = start(LIMIT * 3, Some(LIMIT / 4)).await;

        started.unwrap();
        assert_eq!(took, LIMIT * 3);
    }

    #[tokio::test(start_paused = true)]
    async fn guest_that_sends_nothing_is_silent_after_the_limit() {
        for others in [None, Some(LIMIT + LIMIT / 2)] {
            let (started, took) = start(LIMIT * 3, others).await;

            assert!(matches!(started, Err(CallError::Silent { limit: LIMIT })), "{started:?}");
            assert_eq!(took, LIMIT);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn guest_that_answers_only_other_requests_is_busy() {
        let (started, took) = start(Duration::from_secs(3600), Some(LIMIT / 4)).await;

        assert!(matches!(started, Err(CallError::Busy { .. })), "{started:?}");
        assert_eq!(took, LIMIT * BUSY_FACTOR);
    }
}
