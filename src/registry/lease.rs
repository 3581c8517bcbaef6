//! When the memory of a generation is free again.
//!
//! A generation goes when its last request ends, and that may be anywhere: in a handler, in the device worker, in a caller
//! that hung up. Freeing gigabytes takes the operating system a good part of a second, which none of them has to give, so
//! weights are handed to a thread of their own that does nothing else; so are prefix caches of what is not live any more,
//! for whose lock it may have to wait until a forward has ended.

use std::sync::mpsc::{self, SendError, Sender};
use std::sync::{Arc, LazyLock, Mutex};

use prometheus::IntGauge;
use tokio::sync::watch;

use super::Encode;
use crate::domain::{Failure, FailureKind, Sample, Truncation};
use crate::lock::lock;
use crate::model::{Limits, ModelError, Output, Pack, RewardModel, StandsFor};
use crate::scorer::stand_last;
use crate::text::{Before, Encoding};

/// Held by whatever keeps the weights of one generation: the generation itself and each of its models.
#[derive(Debug)]
pub(super) struct Lease {
    /// Closed when the last holder has gone.
    open: watch::Sender<()>,
    /// Counts this generation for as long as it is retiring.
    retiring: Mutex<Option<IntGauge>>,
}

impl Lease {
    pub fn new() -> Arc<Self> {
        Arc::new(Self { open: watch::Sender::new(()), retiring: Mutex::new(None) })
    }

    /// Sees the end of this lease without prolonging it.
    pub fn end(&self) -> LeaseEnd {
        LeaseEnd(self.open.subscribe())
    }

    /// Counts the lease in `gauge` until it ends or is not retiring any more.
    pub fn retire(&self, gauge: &IntGauge) {
        let mut retiring = lock(&self.retiring);
        if retiring.is_none() {
            gauge.inc();
            *retiring = Some(gauge.clone());
        }
    }

    pub fn come_back(&self) {
        if let Some(gauge) = lock(&self.retiring).take() {
            gauge.dec();
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.come_back();
    }
}

/// Whether the memory of one generation is free.
#[derive(Clone, Debug)]
pub struct LeaseEnd(watch::Receiver<()>);

impl LeaseEnd {
    pub fn has_come(&self) -> bool {
        self.0.has_changed().is_err()
    }

    /// Completes when the memory is free.
    pub async fn comes(mut self) {
        // Nothing is ever sent, so the only change is the end.
        while self.0.changed().await.is_ok() {}
    }
}

/// A model that holds its generation's lease, and whose memory is freed on the thread for that.
struct Leased {
    /// Always there, but for the moment of the drop.
    model: Option<Arc<dyn RewardModel>>,
    lease: Arc<Lease>,
}

/// The same model under a lease.
pub(super) fn leased(model: Arc<dyn RewardModel>, lease: &Arc<Lease>) -> Arc<dyn RewardModel> {
    Arc::new(Leased { model: Some(model), lease: lease.clone() })
}

/// What is there of a model whose memory was handed over: nobody meets it.
struct Freed;

impl RewardModel for Freed {
    fn forward(&self, _: &Pack) -> Result<Vec<Output>, ModelError> {
        Err(ModelError::Failed("the model has been freed".to_owned()))
    }

    fn limits(&self) -> Limits {
        Limits { max_tokens: 0, outputs: 0, parameters: 0, device_bytes: 0 }
    }
}

impl StandsFor for Leased {
    fn model(&self) -> &dyn RewardModel {
        self.model.as_deref().unwrap_or(&Freed)
    }
}

/// A text layer that is freed on the thread for that: a vocabulary has a hundred thousand strings.
struct LeasedText(Option<Arc<dyn Encode>>);

/// The same text layer, freed elsewhere.
pub(super) fn leased_text(text: Arc<dyn Encode>) -> Arc<dyn Encode> {
    Arc::new(LeasedText(Some(text)))
}

impl LeasedText {
    fn there(&self) -> Result<&dyn Encode, Failure> {
        self.0.as_deref().ok_or_else(|| Failure::new(FailureKind::Expired, "the text layer has been freed"))
    }
}

impl Encode for LeasedText {
    fn encode(&self, sample: &Sample, truncation: Truncation) -> Result<Encoding, Failure> {
        self.there()?.encode(sample, truncation)
    }

    fn encode_beside(&self, sample: &Sample, truncation: Truncation, before: &mut Before) -> Result<Encoding, Failure> {
        self.there()?.encode_beside(sample, truncation, before)
    }
}

impl Drop for LeasedText {
    fn drop(&mut self) {
        if let Some(text) = self.0.take() {
            let _ = UNDERTAKER.send(Remains::Text(text));
        }
    }
}

impl Drop for Leased {
    fn drop(&mut self) {
        if let Some(model) = self.model.take() {
            // Without the thread the memory is freed here.
            let _ = UNDERTAKER.send(Remains::Model(model, self.lease.clone()));
        }
    }
}

/// Has these models keep prefixes of so many bytes each, on the thread that frees memory. What is asked for later comes later.
pub(super) fn keep_prefixes(models: Vec<Arc<dyn RewardModel>>, each: usize) {
    if let Err(SendError(remains)) = UNDERTAKER.send(Remains::Prefixes(models, each)) {
        remains.settle();
    }
}

/// Waits until all is free that has been handed over so far: whoever takes memory next should find it.
pub(super) fn wait_until_free() {
    let (done, all) = mpsc::channel();
    if UNDERTAKER.send(Remains::Told(done)).is_ok() {
        let _ = all.recv();
    }
}

/// What is left of a generation that is not live any more.
enum Remains {
    /// Dropped in this order: the model, then its lease.
    Model(Arc<dyn RewardModel>, Arc<Lease>),
    Text(Arc<dyn Encode>),
    /// Models, and the bytes that each may keep from now on.
    Prefixes(Vec<Arc<dyn RewardModel>>, usize),
    /// Nothing: somebody wants to know that all before it is free.
    Told(Sender<()>),
}

impl Remains {
    fn settle(self) {
        match self {
            Self::Model(model, lease) => {
                drop(model);
                drop(lease);
            }
            Self::Text(text) => drop(text),
            Self::Prefixes(models, each) => models.iter().for_each(|model| model.keep_prefixes(each)),
            Self::Told(done) => _ = done.send(()),
        }
    }
}

static UNDERTAKER: LazyLock<Sender<Remains>> = LazyLock::new(|| {
    let (sender, receiver) = mpsc::channel::<Remains>();
    let free = move || {
        stand_last();
        receiver.into_iter().for_each(Remains::settle);
    };
    if let Err(error) = std::thread::Builder::new().name("warm-free".to_owned()).spawn(free) {
        tracing::warn!(%error, "no thread to free weights on, so requests will");
    }
    sender
});

#[cfg(test)]
mod tests {
    use super::super::testing::FakeModel;
    use super::*;

    #[tokio::test]
    async fn a_lease_ends_with_its_last_model_and_not_before() {
        let lease = Lease::new();
        let end = lease.end();
        let (first, second) = (leased(FakeModel::new(1.0), &lease), leased(FakeModel::new(2.0), &lease));
        let gauge = IntGauge::new("retiring", "x").expect("a name");
        lease.retire(&gauge);
        lease.retire(&gauge);
        drop((lease, first));
        assert!(!end.has_come());
        assert_eq!(gauge.get(), 1);
        drop(second);
        end.clone().comes().await;
        assert!(end.has_come());
        assert_eq!(gauge.get(), 0);
    }

    /// Tells on which thread it is freed.
    struct Vocabulary(mpsc::Sender<Option<String>>);

    impl Encode for Vocabulary {
        fn encode(&self, _: &Sample, _: Truncation) -> Result<Encoding, Failure> {
            Ok(Encoding::for_test(vec![1]))
        }
    }

    impl Drop for Vocabulary {
        fn drop(&mut self) {
            let _ = self.0.send(std::thread::current().name().map(str::to_owned));
        }
    }

    #[test]
    fn whoever_waits_finds_all_free_that_was_handed_over() {
        let lease = Lease::new();
        let (end, models) = (lease.end(), [1.0, 2.0, 3.0].map(|factor| leased(FakeModel::new(factor), &lease)));
        drop((lease, models));
        wait_until_free();
        assert!(end.has_come());
    }

    #[test]
    fn a_text_layer_is_freed_on_the_thread_for_that() {
        let (told, freed) = mpsc::channel();
        let text = leased_text(Arc::new(Vocabulary(told)));
        assert!(text.encode(&Sample::Text("x".to_owned()), Truncation::Refuse).is_ok());
        drop(text);
        assert_eq!(freed.recv().expect("freed").as_deref(), Some("warm-free"));
    }
}
