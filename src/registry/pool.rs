//! The threads that read text, apart from those of the runtime.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use rayon::prelude::*;
use tokio::sync::oneshot;

use super::EngineError;
use super::generation::Encode;
use crate::domain::{Failure, Sample, Truncation};
use crate::scorer::{Permit, panic_message};
use crate::text::Encoding;

/// What a call's samples become, in order.
pub(super) type Encoded = Vec<Result<Arc<Encoding>, Failure>>;

/// How the samples of a call are read.
#[derive(Clone)]
pub(super) struct Reading {
    pub text: Arc<dyn Encode>,
    pub truncation: Truncation,
    /// Whether the text that a template gives is kept: somebody wants to see it.
    pub rendered: bool,
}

impl Reading {
    pub fn encode(&self, sample: &Sample) -> Result<Arc<Encoding>, Failure> {
        let encoding = self.text.encode(sample, self.truncation)?;
        Ok(Arc::new(if self.rendered { encoding } else { encoding.without_rendered() }))
    }
}

/// A pool of threads that read text.
pub(super) struct Pool(rayon::ThreadPool);

impl Pool {
    /// Starts so many threads; 0 is one per core.
    pub fn new(threads: usize) -> std::io::Result<Self> {
        let builder = rayon::ThreadPoolBuilder::new().num_threads(threads).thread_name(|i| format!("warm-tokenizer-{i}"));
        builder.build().map(Self).map_err(std::io::Error::other)
    }

    /// What `work` comes to on one of the threads. It can ask whether its caller is still there; where nobody is when its
    /// turn comes, it is not begun.
    pub async fn run<T: Send + 'static>(&self, work: impl FnOnce(&(dyn Fn() -> bool + Sync)) -> T + Send + 'static) -> Result<T, EngineError> {
        let (done, result) = oneshot::channel();
        self.0.spawn(move || {
            if !done.is_closed() {
                let wanted = || !done.is_closed();
                let result = caught(|| work(&wanted));
                let _ = done.send(result);
            }
        });
        result.await.unwrap_or_else(|_| Err(EngineError::Forward("the pool has ended".to_owned())))
    }

    /// All samples, side by side. The permit is held as long as they are.
    pub async fn encode(&self, reading: Reading, samples: Vec<Sample>, permit: Permit) -> Result<Encoded, EngineError> {
        let encoded = self.run(move |wanted| {
            // A caller that has gone stops this between two samples.
            let encoded = samples.par_iter().map(|sample| wanted().then(|| reading.encode(sample))).collect::<Option<Encoded>>();
            drop((samples, permit));
            encoded
        });
        encoded.await?.ok_or_else(|| EngineError::Forward("encoding was given up".to_owned()))
    }
}

/// What `work` comes to, a panic being an error of its call alone.
pub(super) fn caught<T>(work: impl FnOnce() -> T) -> Result<T, EngineError> {
    catch_unwind(AssertUnwindSafe(work))
        .map_err(|panic| EngineError::Forward(format!("encoding panicked: {}", panic_message(panic.as_ref()))))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One token, and a text as of a template.
    struct Rendering;

    impl Encode for Rendering {
        fn encode(&self, _: &Sample, _: Truncation) -> Result<Encoding, Failure> {
            Ok(Encoding::for_test(vec![1]).with_rendered("<user>x"))
        }
    }

    #[test]
    fn what_a_template_wrote_is_kept_only_where_somebody_wants_to_see_it() {
        let reading = |rendered| Reading { text: Arc::new(Rendering), truncation: Truncation::Refuse, rendered };
        let rendered = |reading: Reading| reading.encode(&Sample::Text("x".into())).expect("encoded").rendered().map(str::to_owned);
        assert_eq!((rendered(reading(true)).as_deref(), rendered(reading(false))), (Some("<user>x"), None));
    }
}
