//! Weights on their way to a device: while one block is rounded and copied by a thread for that, the next one is read, be it of
//! the same tensor or of the one behind it. On the host there are never more than these two blocks, and on the device there is
//! one beside the tensor that it becomes a part of. (A matrix that is turned round is one block.)

use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use candle_core::{DType, Device, Error, Result, Tensor, bail};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use super::device::{Backend, Staging};
use crate::checkpoint::CHUNK_ELEMENTS;
use crate::lock::lock;

/// What takes blocks.
pub trait Place: Send + 'static {
    /// Makes these values the elements of a flat tensor from `at` on. They may be written over once it returns.
    fn put(&mut self, values: &[f32], whole: &Tensor, at: usize) -> Result<()>;
}

/// A device, and memory of the host from where copies to it are fast.
struct OnDevice {
    device: Arc<Device>,
    staging: Staging,
}

impl Place for OnDevice {
    fn put(&mut self, values: &[f32], whole: &Tensor, at: usize) -> Result<()> {
        let (device, count) = (&*self.device, values.len());
        let block = match whole.dtype() {
            DType::BF16 => {
                let numbers = self.staging.of::<bf16>(count)?;
                numbers.convert_from_f32_slice(values);
                Tensor::from_slice(numbers, count, device)?
            }
            DType::F16 => {
                let numbers = self.staging.of::<f16>(count)?;
                numbers.convert_from_f32_slice(values);
                Tensor::from_slice(numbers, count, device)?
            }
            _ => {
                let numbers = self.staging.of::<f32>(count)?;
                numbers.copy_from_slice(values);
                Tensor::from_slice(numbers, count, device)?
            }
        };
        whole.slice_set(&block, 0, at)?;
        // The copy may still read what is written over next.
        device.synchronize()
    }
}

enum Job {
    /// The first so many values are elements of a tensor, from `at` on.
    Block { values: Vec<f32>, used: usize, whole: Tensor, at: usize },
    /// Somebody waits for all blocks so far.
    Settle(Sender<()>),
}

/// The thread, and what it has done with. One tensor after another. A block that fails fails all, and nothing is copied behind it.
pub struct Placer {
    device: Arc<Device>,
    jobs: Option<SyncSender<Job>>,
    spare: Receiver<Vec<f32>>,
    thread: Option<JoinHandle<()>>,
    /// Why a block has failed: nobody needs to read on.
    failed: Arc<Mutex<Option<Error>>>,
}

impl Placer {
    pub fn onto(backend: &Backend) -> std::io::Result<Self> {
        let (device, staging) = (Arc::clone(&backend.device), Staging::on(backend.place, CHUNK_ELEMENTS * backend.weights.size_in_bytes()));
        Self::with(Arc::clone(&device), OnDevice { device, staging })
    }

    fn with(device: Arc<Device>, mut place: impl Place) -> std::io::Result<Self> {
        // A block is handed over when the one before it is done with.
        let (jobs, taken) = sync_channel::<Job>(0);
        let (done_with, spare) = channel();
        let failed = Arc::new(Mutex::new(None));
        let fails = Arc::clone(&failed);
        let run = move || {
            for job in taken {
                match job {
                    Job::Block { values, used, whole, at } => {
                        if lock(&fails).is_none()
                            && let Err(error) = place.put(&values[..used], &whole, at)
                        {
                            *lock(&fails) = Some(error);
                        }
                        let _ = done_with.send(values);
                    }
                    Job::Settle(reply) => _ = reply.send(()),
                }
            }
        };
        let thread = std::thread::Builder::new().name("warm-place".to_owned()).spawn(run)?;
        Ok(Self { device, jobs: Some(jobs), spare, thread: Some(thread), failed })
    }

    /// A flat tensor of so many elements is read now.
    pub fn begin(&self, elements: usize, dtype: DType) -> Result<Filling<'_>> {
        let whole = Tensor::zeros(elements, dtype, &self.device)?;
        // Each thread has a stream of its own on a card: the zeros are there before the other one writes.
        self.device.synchronize()?;
        Ok(Filling { placer: self, whole, placed: 0, block: Vec::new(), used: 0 })
    }

    /// Waits until every tensor is what was read; after an error none of those so far is. Before that nobody may compute with one.
    pub fn settle(&self) -> Result<()> {
        let (reply, settled) = channel();
        self.send(Job::Settle(reply))?;
        settled.recv().map_err(|_| ended())?;
        lock(&self.failed).take().map_or(Ok(()), Err)
    }

    fn send(&self, job: Job) -> Result<()> {
        let sent = self.jobs.as_ref().is_some_and(|jobs| jobs.send(job).is_ok());
        if sent { Ok(()) } else { Err(ended()) }
    }
}

impl Drop for Placer {
    fn drop(&mut self) {
        drop(self.jobs.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn ended() -> Error {
    Error::Msg("the thread that copies to the device has ended".to_owned())
}

/// Where the elements of a tensor go that is being read.
pub enum Room<'p> {
    /// Into its own memory, of which so much is in use.
    Here {
        values: Vec<f32>,
        used: usize,
    },
    Device(Filling<'p>),
}

impl Room<'_> {
    /// For so many elements, all zero.
    pub fn here(elements: usize) -> Self {
        Self::Here { values: vec![0.0; elements], used: 0 }
    }

    /// Where its next so many elements go. All of them are to be written.
    pub fn next(&mut self, elements: usize) -> Result<&mut [f32]> {
        match self {
            Self::Device(filling) => filling.room(elements),
            Self::Here { values, used } => {
                let first = *used;
                *used += elements;
                values.get_mut(first..*used).ok_or_else(|| Error::Msg(format!("more than {first} elements were read")))
            }
        }
    }
}

/// A tensor that is being read.
pub struct Filling<'p> {
    placer: &'p Placer,
    whole: Tensor,
    /// Elements that were handed over.
    placed: usize,
    block: Vec<f32>,
    used: usize,
}

impl Filling<'_> {
    /// Where its next so many elements go. All of them are to be written.
    pub fn room(&mut self, elements: usize) -> Result<&mut [f32]> {
        if self.used > 0 && self.used + elements > self.block.len() {
            self.hand_over()?;
        }
        if self.block.is_empty() {
            self.block = self.placer.spare.try_recv().unwrap_or_default();
        }
        let whole = CHUNK_ELEMENTS.max(self.used + elements);
        if self.block.len() < whole {
            self.block.resize(whole, 0.0);
        }
        self.used += elements;
        Ok(&mut self.block[self.used - elements..self.used])
    }

    /// The tensor, in the order in which it is read; it is there once the placer has settled.
    pub fn end(mut self, shape: &[usize]) -> Result<Tensor> {
        if self.used > 0 {
            self.hand_over()?;
        }
        if self.placed != self.whole.elem_count() {
            bail!("{} elements were read of {}", self.placed, self.whole.elem_count());
        }
        self.whole.reshape(shape)
    }

    fn hand_over(&mut self) -> Result<()> {
        if lock(&self.placer.failed).is_some() {
            self.placer.settle()?;
        }
        let (values, used) = (std::mem::take(&mut self.block), std::mem::take(&mut self.used));
        let at = self.placed;
        self.placed += used;
        self.placer.send(Job::Block { values, used, whole: self.whole.clone(), at })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::sync::{Condvar, Mutex};

    use super::*;

    /// The CPU, told about every block before it is taken, and held up where a test wants that.
    struct Slow {
        first: Sender<f32>,
        go_on: Receiver<()>,
    }

    impl Place for Slow {
        fn put(&mut self, values: &[f32], whole: &Tensor, at: usize) -> Result<()> {
            self.first.send(values[0]).map_err(|_| ended())?;
            self.go_on.recv().map_err(|_| ended())?;
            if values[0] < 0.0 {
                candle_core::bail!("CUDA_ERROR_OUT_OF_MEMORY");
            }
            whole.slice_set(&Tensor::from_slice(values, values.len(), &Device::Cpu)?.to_dtype(whole.dtype())?, 0, at)
        }
    }

    fn slow() -> (Placer, Receiver<f32>, Sender<()>) {
        let ((first, seen), (goes, go_on)) = (mpsc::channel(), mpsc::channel());
        (Placer::with(Arc::new(Device::Cpu), Slow { first, go_on }).expect("a thread"), seen, goes)
    }

    fn fill(filling: &mut Filling, elements: usize, first: f32) {
        let room = filling.room(elements).expect("room");
        room.iter_mut().enumerate().for_each(|(i, value)| *value = first + (i % 7) as f32);
    }

    #[test]
    fn a_block_is_read_while_the_one_before_it_is_copied_whichever_tensor_it_is_of_and_no_more_than_these_two_are_held() {
        let (placer, seen, goes) = slow();
        let (reached, arrived) = (&Mutex::new(0usize), &Condvar::new());
        std::thread::scope(|scope| {
            let reading = scope.spawn(move || {
                let tensors = [0, 2].map(|before| {
                    let mut filling = placer.begin(2 * CHUNK_ELEMENTS, DType::F32).expect("a tensor");
                    for block in before + 1..=before + 2 {
                        fill(&mut filling, CHUNK_ELEMENTS, block as f32);
                        *reached.lock().expect("whole") = block;
                        arrived.notify_all();
                    }
                    filling.end(&[2, CHUNK_ELEMENTS]).expect("a tensor")
                });
                placer.settle().map(|()| tensors)
            });
            let until = |blocks: usize| {
                let read = arrived.wait_while(reached.lock().expect("whole"), |read| *read < blocks).expect("whole");
                *read
            };
            for block in 1..=4usize {
                assert_eq!(seen.recv(), Ok(block as f32));
                // While this one is being copied the next is read, and waits: the one behind it is not begun.
                assert_eq!(until((block + 1).min(4)), (block + 1).min(4));
                goes.send(()).expect("it waits");
            }
            let tensors = reading.join().expect("no panic").expect("nothing fails");
            let of = |tensor: &Tensor, row: usize| tensor.get(row).and_then(|row| row.get(8)).and_then(|one| one.to_scalar::<f32>());
            let firsts = tensors.each_ref().map(|tensor| [0, 1].map(|row| of(tensor, row).expect("a number")));
            assert_eq!(firsts, [[2.0, 3.0], [4.0, 5.0]]);
        });
    }

    #[test]
    fn small_parts_ride_together_and_a_large_one_goes_by_itself() {
        let (placer, seen, goes) = slow();
        (0..3).for_each(|_| goes.send(()).expect("it waits"));
        let elements = 2 * CHUNK_ELEMENTS + 12;
        let mut filling = placer.begin(elements, DType::BF16).expect("a tensor");
        fill(&mut filling, 5, 1.0);
        fill(&mut filling, 6, 10.0);
        fill(&mut filling, CHUNK_ELEMENTS, 20.0);
        fill(&mut filling, CHUNK_ELEMENTS + 1, 30.0);
        let tensor = filling.end(&[elements]).expect("a tensor");
        placer.settle().expect("nothing fails");
        assert_eq!(tensor.dtype(), DType::BF16);
        let some = |first: usize, count: usize| {
            let some = tensor.narrow(0, first, count).and_then(|some| some.to_dtype(DType::F32));
            some.and_then(|some| some.to_vec1::<f32>()).expect("numbers")
        };
        assert_eq!(some(0, 12), [1., 2., 3., 4., 5., 10., 11., 12., 13., 14., 15., 20.]);
        assert_eq!(some(CHUNK_ELEMENTS + 11, 2), [30., 31.]);
        drop(placer);
        assert_eq!(seen.iter().collect::<Vec<_>>(), [1.0, 20.0, 30.0]);
    }

    #[test]
    fn a_block_that_fails_fails_the_load_and_nothing_is_copied_behind_it() {
        let (placer, seen, goes) = slow();
        (0..2).for_each(|_| goes.send(()).expect("it waits"));
        let tensor = |firsts: &[f32]| {
            let mut filling = placer.begin(firsts.len() * CHUNK_ELEMENTS, DType::F32)?;
            firsts.iter().try_for_each(|first| {
                filling.room(CHUNK_ELEMENTS).map(|room| room.iter_mut().enumerate().for_each(|(i, value)| *value = first + (i % 7) as f32))
            })?;
            filling.end(&[firsts.len() * CHUNK_ELEMENTS])
        };
        // Who reads on is told at the latest when all is to be there.
        let load = || tensor(&[1.0, -1.0, 2.0]).and_then(|_| tensor(&[3.0])).and_then(|_| placer.settle());
        let failed = load().expect_err("fails").to_string();
        assert!(failed.contains("CUDA_ERROR_OUT_OF_MEMORY"), "{failed}");
        drop(goes);
        assert!(tensor(&[4.0]).and_then(|_| placer.settle()).is_err(), "nobody waits for ever");
        drop(placer);
        assert_eq!(seen.iter().collect::<Vec<_>>(), [1.0, -1.0, 4.0]);
    }

    #[test]
    fn a_tensor_of_which_too_little_was_read_is_refused() {
        let (placer, _seen, goes) = slow();
        goes.send(()).expect("it waits");
        let mut filling = placer.begin(12, DType::F32).expect("a tensor");
        fill(&mut filling, 11, 1.0);
        let refused = filling.end(&[3, 4]).expect_err("refused").to_string();
        assert!(refused.starts_with("11 elements were read of 12"), "{refused}");
    }

    #[test]
    fn what_is_placed_is_rounded_as_ever() {
        let values: Vec<f32> = (0..4096).map(|i| (i as f32 * 0.37).sin() * 1000f32.powf((i % 5) as f32 - 2.0)).collect();
        let mut place = OnDevice { device: Arc::new(Device::Cpu), staging: Staging::on(crate::model::Place::Cpu, 16) };
        for dtype in [DType::BF16, DType::F16, DType::F32] {
            let flat = |tensor: &Tensor| tensor.to_dtype(DType::F32).and_then(|tensor| tensor.to_vec1::<f32>()).expect("numbers");
            let expected = crate::model::reading::placed(values.clone(), &[values.len()], dtype, &Device::Cpu).expect("a tensor");
            let whole = Tensor::zeros(values.len() + 3, dtype, &Device::Cpu).expect("a tensor");
            place.put(&values, &whole, 2).expect("room");
            assert_eq!(flat(&whole), [&[0.0; 2], &*flat(&expected), &[0.0]].concat(), "{dtype:?}");
        }
    }
}
