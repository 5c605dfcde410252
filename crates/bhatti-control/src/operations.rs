//! Operations: work that outlasts the request that began it. They pull, push and make
//! images.
//!
//! An operation belongs to a user, runs without a client, and can be watched and canceled. Asking
//! for the same work again joins the operation. Operations are in memory alone: a daemon that ends
//! ends them, and what they left is continued by the next one that is asked for.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::SystemTime;

use bhatti_node::{Layer, PullProgress};
use bhatti_store::{ImageRow, TemplateRow};
use bhatti_types::{QuotaExceeded, UserId};
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::task::AbortHandle;

use crate::operation_errors::OperationFailure;
use crate::operation_log::{LogPart, OperationLog};

/// Maximum number of a user's operations that run at once.
const RUNNING_MAX: u32 = 8;

/// Number of operations that builds leave to their own pulls.
const PULLS_OF_BUILDS: u32 = 2;

/// Number of a user's ended operations that are remembered.
const ENDED_MAX: usize = 32;

/// What an operation has pulled, pushed or made.
#[derive(Clone, Debug)]
pub enum Made {
    /// An image.
    Image(Arc<ImageRow>),
    /// A template.
    Template(Arc<TemplateRow>),
}

impl From<ImageRow> for Made {
    fn from(row: ImageRow) -> Self {
        Self::Image(Arc::new(row))
    }
}

/// State of an operation.
#[derive(Clone, Debug)]
pub enum OperationState {
    /// It runs.
    Running,
    /// It is done.
    Done(Made),
    /// It failed.
    Failed(Arc<OperationFailure>),
    /// It was canceled.
    Canceled,
}

/// Progress of one layer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LayerProgress {
    /// SHA-256 of the layer as the registry has it, in hexadecimal.
    pub sha256: String,
    /// Its length, in bytes.
    pub bytes: u64,
    /// The bytes that have arrived.
    pub arrived: u64,
    /// Whether it has been unpacked.
    pub unpacked: bool,
}

/// What an operation does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OperationKind {
    /// It pulls an image.
    Pull,
    /// It pushes an image.
    Push,
    /// It saves a sandbox as an image.
    Save,
    /// It builds an image from a Dockerfile.
    Build,
    /// It builds a template from steps.
    Template,
}

/// An operation of a user.
#[derive(Clone)]
pub struct Operation(Arc<Inner>);

struct Inner {
    id: String,
    kind: OperationKind,
    image: String,
    began: SystemTime,
    layers: Mutex<Vec<LayerProgress>>,
    log: OperationLog,
    state: watch::Sender<OperationState>,
    task: Mutex<Option<AbortHandle>>,
}

impl Operation {
    /// Returns the id: 16 hex digits.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.0.id
    }

    /// Returns what it does.
    #[must_use]
    pub fn kind(&self) -> OperationKind {
        self.0.kind
    }

    /// Returns the reference of the image.
    #[must_use]
    pub fn image(&self) -> &str {
        &self.0.image
    }

    /// Returns when it began.
    #[must_use]
    pub fn began(&self) -> SystemTime {
        self.0.began
    }

    /// Returns its state.
    #[must_use]
    pub fn state(&self) -> OperationState {
        self.0.state.borrow().clone()
    }

    /// Returns the progress of the image's layers, lowest first. It is empty until the registry
    /// has named them.
    #[must_use]
    pub fn layers(&self) -> Vec<LayerProgress> {
        self.0.layers.lock().clone()
    }

    /// Adds output of its work.
    pub(crate) fn write(&self, output: &[u8]) {
        self.0.log.write(output);
    }

    /// Waits for output of its work after the byte `from`, and returns it from there on. Only the
    /// last 256 KiB are kept. Returns `None` when the operation has ended and no more follows.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    pub async fn output(&self, from: u64) -> Option<LogPart> {
        self.0.log.read(from).await
    }

    /// Waits until it has ended, and returns how.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: the operation continues.
    pub async fn ended(&self) -> OperationState {
        let mut state = self.0.state.subscribe();
        let ended = state.wait_for(|state| !matches!(state, OperationState::Running)).await;
        // The sender lives as long as the operation.
        ended.map_or(OperationState::Canceled, |state| state.clone())
    }

    /// Ends it, unless it has ended. What has arrived of the image stays for the next pull.
    pub fn cancel(&self) {
        if let Some(task) = self.0.task.lock().take() {
            task.abort();
        }
        self.end(OperationState::Canceled);
    }

    /// Notes how it ended. Of several ends, the first counts.
    fn end(&self, ended: OperationState) {
        self.0.state.send_if_modified(|state| {
            let runs = matches!(state, OperationState::Running);
            if runs {
                *state = ended;
            }
            runs
        });
        self.0.log.end();
    }

    fn runs(&self) -> bool {
        matches!(*self.0.state.borrow(), OperationState::Running)
    }
}

impl PullProgress for Operation {
    fn begin(&self, layers: &[Layer]) {
        let begun = |layer: &Layer| LayerProgress {
            sha256: layer.sha256.clone(),
            bytes: layer.bytes,
            ..LayerProgress::default()
        };
        *self.0.layers.lock() = layers.iter().map(begun).collect();
    }

    fn arrived(&self, layer: usize, bytes: i64) {
        if let Some(layer) = self.0.layers.lock().get_mut(layer) {
            layer.arrived = layer.arrived.saturating_add_signed(bytes);
        }
    }

    fn unpacked(&self, layer: usize) {
        if let Some(layer) = self.0.layers.lock().get_mut(layer) {
            layer.unpacked = true;
        }
    }
}

/// The operations of all users, by owner, and by age within each.
#[derive(Default)]
pub(crate) struct Operations(Mutex<BTreeMap<UserId, Vec<Operation>>>);

impl Operations {
    /// Returns the owner's running operation that does this with `image`, or begins one with
    /// `work`.
    ///
    /// # Errors
    ///
    /// Returns an error if the owner has too many running operations.
    pub(crate) fn join_or_begin<F, T, E>(
        &self,
        owner: UserId,
        id: [u8; 8],
        (kind, image): (OperationKind, &str),
        work: impl FnOnce(Operation) -> F,
    ) -> Result<Operation, QuotaExceeded>
    where
        F: Future<Output = Result<T, E>> + Send + 'static,
        T: Into<Made>,
        E: Into<OperationFailure>,
    {
        let mut all = self.0.lock();
        let own = all.entry(owner).or_default();
        let running = own.iter().filter(|operation| operation.runs());
        if let Some(same) = running.clone().find(|it| (it.kind(), it.image()) == (kind, image)) {
            return Ok(same.clone());
        }
        let operation = admit(own, id, (kind, image))?;
        drop(all);
        Ok(start(operation, work))
    }

    /// Begins an operation.
    ///
    /// # Errors
    ///
    /// Returns an error if the owner has too many running operations.
    pub(crate) fn begin<F, T, E>(
        &self,
        owner: UserId,
        id: [u8; 8],
        (kind, image): (OperationKind, &str),
        work: impl FnOnce(Operation) -> F,
    ) -> Result<Operation, QuotaExceeded>
    where
        F: Future<Output = Result<T, E>> + Send + 'static,
        T: Into<Made>,
        E: Into<OperationFailure>,
    {
        let operation = admit(self.0.lock().entry(owner).or_default(), id, (kind, image))?;
        Ok(start(operation, work))
    }

    /// Returns a user's operations, newest first.
    pub(crate) fn list(&self, owner: UserId) -> Vec<Operation> {
        let all = self.0.lock();
        all.get(&owner).map(|own| own.iter().rev().cloned().collect()).unwrap_or_default()
    }

    /// Returns the operation of a user with this id.
    pub(crate) fn find(&self, owner: UserId, id: &str) -> Option<Operation> {
        self.0.lock().get(&owner)?.iter().find(|operation| operation.id() == id).cloned()
    }
}

/// Adds an operation to those of its owner.
fn admit(
    own: &mut Vec<Operation>,
    id: [u8; 8],
    (kind, image): (OperationKind, &str),
) -> Result<Operation, QuotaExceeded> {
    let running = own.iter().filter(|operation| operation.runs());
    let used = u32::try_from(running.count()).unwrap_or(u32::MAX);
    // A build pulls the images that it begins with.
    let max = match kind {
        OperationKind::Build | OperationKind::Template => RUNNING_MAX - PULLS_OF_BUILDS,
        OperationKind::Pull | OperationKind::Push | OperationKind::Save => RUNNING_MAX,
    };
    if used >= max {
        return Err(QuotaExceeded::Count { what: "running operation", used, max });
    }
    let operation = Operation(Arc::new(Inner {
        id: format!("{:016x}", u64::from_be_bytes(id)),
        kind,
        image: image.to_owned(),
        began: SystemTime::now(),
        layers: Mutex::default(),
        log: OperationLog::default(),
        state: watch::Sender::new(OperationState::Running),
        task: Mutex::default(),
    }));
    own.push(operation.clone());
    forget_oldest(own);
    Ok(operation)
}

/// Starts the work of an operation.
fn start<F, T, E>(operation: Operation, work: impl FnOnce(Operation) -> F) -> Operation
where
    F: Future<Output = Result<T, E>> + Send + 'static,
    T: Into<Made>,
    E: Into<OperationFailure>,
{
    let work = work(operation.clone());
    let done = operation.clone();
    let task = tokio::spawn(async move {
        done.end(match work.await {
            Ok(made) => OperationState::Done(made.into()),
            Err(error) => OperationState::Failed(Arc::new(error.into())),
        });
    });
    let task = task.abort_handle();
    *operation.0.task.lock() = Some(task.clone());
    // It may have been canceled before it had a task.
    if !operation.runs() {
        task.abort();
    }
    operation
}

/// Forgets the oldest operations that have ended if there are too many.
fn forget_oldest(own: &mut Vec<Operation>) {
    let ended = own.iter().filter(|operation| !operation.runs()).count();
    let mut surplus = ended.saturating_sub(ENDED_MAX);
    own.retain(|operation| {
        let is_surplus = surplus > 0 && !operation.runs();
        surplus -= usize::from(is_surplus);
        !is_surplus
    });
}

#[cfg(test)]
mod tests {
    use std::future::{pending, ready};

    use super::OperationKind::{Pull, Push};
    use super::*;

    const OWNER: UserId = UserId::ADMIN;

    fn never() -> std::future::Pending<Result<ImageRow, OperationFailure>> {
        pending()
    }

    fn failure() -> OperationFailure {
        crate::image_errors::PullFailure::Reference("no reference".to_owned()).into()
    }

    #[tokio::test]
    async fn same_image_is_pulled_once_for_each_user() {
        let operations = Operations::default();
        let begin = |owner, number: u8, image| {
            let id = [number; 8];
            operations.join_or_begin(owner, id, (Pull, image), |_| never()).unwrap().id().to_owned()
        };
        let other = UserId::from_entropy([1; 8]);

        let ids = [begin(OWNER, 1, "a"), begin(OWNER, 2, "a"), begin(OWNER, 3, "b")];
        assert_eq!((ids[0] == ids[1], ids[0] == ids[2]), (true, false));
        assert_ne!(begin(other, 4, "a"), ids[0]);
        assert!(operations.find(other, &ids[0]).is_none());
        assert_eq!(operations.list(OWNER).len(), 2);
        let push = operations.join_or_begin(OWNER, [5; 8], (Push, "a"), |_| never()).unwrap();
        assert_ne!(push.id(), ids[0]);
    }

    #[tokio::test]
    async fn running_and_remembered_operations_are_limited() {
        let operations = Operations::default();
        for number in 0..100_u8 {
            let image = format!("ended-{number}");
            let begun = operations.join_or_begin(OWNER, [number; 8], (Pull, &image), |_| {
                ready(Err::<ImageRow, _>(failure()))
            });
            assert!(matches!(begun.unwrap().ended().await, OperationState::Failed(_)));
        }
        assert_eq!(operations.list(OWNER).len(), ENDED_MAX + 1);
        assert_eq!(operations.list(OWNER)[0].image(), "ended-99");

        for number in 0..8_u8 {
            let image = format!("running-{number}");
            operations.join_or_begin(OWNER, [number; 8], (Pull, &image), |_| never()).unwrap();
        }
        let refused = operations.join_or_begin(OWNER, [9; 8], (Pull, "more"), |_| never());
        assert!(matches!(refused, Err(QuotaExceeded::Count { max: RUNNING_MAX, .. })));
        operations.list(OWNER)[0].cancel();
        operations.join_or_begin(OWNER, [9; 8], (Pull, "more"), |_| never()).unwrap();
    }

    #[tokio::test]
    async fn canceled_operation_ends_its_work_and_those_who_wait() {
        let operations = Operations::default();
        let (work, mut ended) = watch::channel(());
        let operation = operations.join_or_begin(OWNER, [1; 8], (Pull, "a"), |_| async move {
            let _work = work;
            never().await
        });
        let operation = operation.unwrap();
        let waiting = tokio::spawn({
            let operation = operation.clone();
            async move { operation.ended().await }
        });
        tokio::task::yield_now().await;

        operation.cancel();

        assert!(matches!(waiting.await.unwrap(), OperationState::Canceled));
        ended.changed().await.unwrap_err();
        assert!(matches!(operation.state(), OperationState::Canceled));
    }
}
