//! The threads that read text, apart from those of the runtime.

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::oneshot;

use super::EngineError;
use super::generation::Encode;
use super::turns::Turns;
use crate::domain::{Failure, Sample, Truncation};
use crate::lock::lock;
use crate::scorer::{Permit, panic_message};
use crate::text::{Before, Encoding};

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
    pub fn encode(&self, sample: &Sample, before: &mut Before) -> Result<Arc<Encoding>, Failure> {
        let encoding = self.text.encode_beside(sample, self.truncation, before)?;
        Ok(Arc::new(if self.rendered { encoding } else { encoding.without_rendered() }))
    }
}

/// A pool of threads that read text. Work waits in pieces, and tenants take turns, so nobody waits for all of another's text.
pub(super) struct Pool {
    threads: rayon::ThreadPool,
    turns: Arc<Mutex<Turns<Piece>>>,
}

/// What one thread does in one turn.
type Piece = Box<dyn FnOnce() + Send>;

/// Bytes of text that are read in one turn, where there are several samples.
const TURN_BYTES: usize = 64 << 10;

impl Pool {
    /// Starts so many threads; 0 is one per core.
    pub fn new(threads: usize) -> std::io::Result<Self> {
        let builder = rayon::ThreadPoolBuilder::new().num_threads(threads).thread_name(|i| format!("warm-tokenizer-{i}"));
        Ok(Self { threads: builder.build().map_err(std::io::Error::other)?, turns: Arc::default() })
    }

    fn push(&self, tenant: &Arc<str>, piece: Piece) {
        lock(&self.turns).push(tenant, piece);
        let turns = self.turns.clone();
        // As many turns as pieces; which piece it is, is decided when a thread is free.
        self.threads.spawn(move || {
            let piece = lock(&turns).next();
            if let Some(piece) = piece {
                piece();
            }
        });
    }

    /// What `work` comes to on one of the threads. The permit is held as long as it waits or runs; where nobody waits for it
    /// when its turn comes, it is not begun.
    pub async fn run<T: Send + 'static>(&self, permit: Permit, work: impl FnOnce() -> T + Send + 'static) -> Result<T, EngineError> {
        let (done, result) = oneshot::channel();
        let tenant = permit.tenant().unwrap_or_default();
        self.push(
            &tenant,
            Box::new(move || {
                if !done.is_closed() {
                    let result = caught(work);
                    drop(permit);
                    let _ = done.send(result);
                }
            }),
        );
        result.await.unwrap_or_else(|_| Err(ended()))
    }

    /// All samples, in order. The permit is held as long as any of them waits or is read.
    pub async fn encode(&self, reading: Reading, samples: Vec<Sample>, permit: Permit) -> Result<Encoded, EngineError> {
        let (done, encoded) = oneshot::channel();
        let tenant = permit.tenant().unwrap_or_default();
        let pieces = pieces(samples.iter().map(Sample::size_bytes));
        let parts = Mutex::new(vec![None; pieces.len()]);
        let text = Arc::new(Text { reading, samples, parts, done: Mutex::new(Some(done)), permit });
        for (part, range) in pieces.into_iter().enumerate() {
            let text = text.clone();
            let piece = move || {
                text.read(part, range);
                text.let_go();
            };
            self.push(&tenant, Box::new(piece));
        }
        text.let_go();
        encoded.await.unwrap_or_else(|_| Err(ended()))
    }
}

/// Consecutive ranges of things of these sizes, each of about a turn.
fn pieces(sizes: impl Iterator<Item = usize>) -> Vec<Range<usize>> {
    let (mut pieces, mut bytes) = (Vec::<Range<usize>>::new(), TURN_BYTES);
    for (i, size) in sizes.enumerate() {
        match pieces.last_mut().filter(|_| bytes < TURN_BYTES) {
            Some(piece) => piece.end = i + 1,
            None => {
                pieces.push(i..i + 1);
                bytes = 0;
            }
        }
        bytes += size.max(1);
    }
    pieces
}

/// The samples of one call while they are read.
struct Text {
    reading: Reading,
    samples: Vec<Sample>,
    /// What has been read, by piece.
    parts: Mutex<Vec<Option<Encoded>>>,
    /// Whoever waits; taken with the answer.
    done: Mutex<Option<oneshot::Sender<Result<Encoded, EngineError>>>>,
    permit: Permit,
}

impl Text {
    fn read(&self, part: usize, range: Range<usize>) {
        // A caller that has gone stops this between two samples.
        let wanted = || lock(&self.done).as_ref().is_some_and(|done| !done.is_closed());
        let encode = || {
            let mut before = Before::default();
            self.samples[range].iter().map(|sample| wanted().then(|| self.reading.encode(sample, &mut before))).collect::<Option<Encoded>>()
        };
        match caught(encode) {
            Ok(encoded) => lock(&self.parts)[part] = encoded,
            Err(panicked) => {
                if let Some(done) = lock(&self.done).take() {
                    let _ = done.send(Err(panicked));
                }
            }
        }
    }

    /// Whoever is the last to let go has the answer, and the permit is back before it is told.
    fn let_go(self: Arc<Self>) {
        let Some(Self { samples, parts, done, permit, .. }) = Arc::into_inner(self) else { return };
        drop((samples, permit));
        let parts: Option<Vec<Encoded>> = parts.into_inner().unwrap_or_else(PoisonError::into_inner).into_iter().collect();
        let done = done.into_inner().unwrap_or_else(PoisonError::into_inner);
        if let (Some(parts), Some(done)) = (parts, done) {
            let _ = done.send(Ok(parts.into_iter().flatten().collect()));
        }
    }
}

fn ended() -> EngineError {
    EngineError::Forward("the pool has ended".to_owned())
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

    proptest::proptest! {
        #[test]
        fn pieces_are_of_about_a_turn_and_leave_nothing_out(sizes in proptest::collection::vec(0usize..100_000, 0..50)) {
            let pieces = pieces(sizes.iter().copied());
            proptest::prop_assert!(pieces.iter().cloned().flatten().eq(0..sizes.len()));
            for (i, piece) in pieces.iter().enumerate() {
                let bytes: usize = sizes[piece.clone()].iter().map(|size| *size.max(&1)).sum();
                proptest::prop_assert!(bytes - sizes[piece.end - 1].max(1) < TURN_BYTES, "one sample less is less than a turn");
                proptest::prop_assert!(bytes >= TURN_BYTES || i + 1 == pieces.len());
            }
        }
    }

    #[test]
    fn what_a_template_wrote_is_kept_only_where_somebody_wants_to_see_it() {
        let reading = |rendered| Reading { text: Arc::new(Rendering), truncation: Truncation::Refuse, rendered };
        let rendered = |reading: Reading| {
            reading.encode(&Sample::Text("x".into()), &mut Before::default()).expect("encoded").rendered().map(str::to_owned)
        };
        assert_eq!((rendered(reading(true)).as_deref(), rendered(reading(false))), (Some("<user>x"), None));
    }
}
