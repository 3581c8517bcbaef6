//! Weights on their way to a device: while one block of a tensor is rounded and copied by a thread for that, the next one is
//! read. On the host there are never more than these two blocks; on the device they become one tensor at its end.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::thread::JoinHandle;

use candle_core::{DType, Device, Error, Result, Tensor};
use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};
use half::{bf16, f16};

use super::device::{Backend, Staging};
use crate::checkpoint::CHUNK_ELEMENTS;

/// What takes blocks.
pub trait Place: Send + 'static {
    /// A flat tensor of these values.
    fn block(&mut self, values: &[f32], dtype: DType) -> Result<Tensor>;

    /// All blocks so far are where they were to be.
    fn settle(&mut self) -> Result<()>;
}

/// A device, and memory of the host from where copies to it are fast.
struct OnDevice {
    device: Arc<Device>,
    staging: Staging,
}

impl Place for OnDevice {
    fn block(&mut self, values: &[f32], dtype: DType) -> Result<Tensor> {
        let (device, count) = (&*self.device, values.len());
        let tensor = match dtype {
            DType::BF16 => {
                let numbers: &mut [bf16] = self.staging.of(count)?.reinterpret_cast_mut();
                numbers.convert_from_f32_slice(values);
                Tensor::from_slice(numbers, count, device)?
            }
            DType::F16 => {
                let numbers: &mut [f16] = self.staging.of(count)?.reinterpret_cast_mut();
                numbers.convert_from_f32_slice(values);
                Tensor::from_slice(numbers, count, device)?
            }
            _ => Tensor::from_slice(values, count, device)?,
        };
        // The copy may still read what is written over next.
        device.synchronize()?;
        Ok(tensor)
    }

    fn settle(&mut self) -> Result<()> {
        self.device.synchronize()
    }
}

enum Job {
    /// The first so many values are the next of the tensor, or begin it.
    Block { values: Vec<f32>, used: usize, dtype: DType, first: bool },
    /// There are no more; the tensor has this shape.
    End { shape: Vec<usize>, reply: Sender<Result<Tensor>> },
}

/// The thread, and what it has done with. One tensor after another.
pub struct Placer {
    jobs: Option<SyncSender<Job>>,
    spare: Receiver<Vec<f32>>,
    thread: Option<JoinHandle<()>>,
}

impl Placer {
    pub fn onto(backend: &Backend) -> std::io::Result<Self> {
        let (device, staging) = (Arc::clone(&backend.device), Staging::on(backend.place, CHUNK_ELEMENTS));
        Self::with(OnDevice { device, staging })
    }

    fn with(mut place: impl Place) -> std::io::Result<Self> {
        // A block is handed over when the one before it is done with.
        let (jobs, taken) = sync_channel::<Job>(0);
        let (done_with, spare) = channel();
        let run = move || {
            let mut placed: Result<Vec<Tensor>> = Ok(Vec::new());
            for job in taken {
                match job {
                    Job::Block { values, used, dtype, first } => {
                        if first {
                            // One that was given up leaves its blocks behind.
                            placed = Ok(Vec::new());
                        }
                        placed = placed.and_then(|mut blocks| {
                            blocks.push(place.block(&values[..used], dtype)?);
                            Ok(blocks)
                        });
                        let _ = done_with.send(values);
                    }
                    Job::End { shape, reply } => {
                        let blocks = std::mem::replace(&mut placed, Ok(Vec::new()));
                        let whole = blocks.and_then(|blocks| Tensor::cat(&blocks, 0)?.reshape(shape));
                        let _ = reply.send(whole.and_then(|whole| place.settle().map(|()| whole)));
                    }
                }
            }
        };
        let thread = std::thread::Builder::new().name("warm-place".to_owned()).spawn(run)?;
        Ok(Self { jobs: Some(jobs), spare, thread: Some(thread) })
    }

    /// A tensor is read now.
    pub fn begin(&self, dtype: DType) -> Filling<'_> {
        Filling { placer: self, block: Vec::new(), used: 0, dtype, first: true }
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
    block: Vec<f32>,
    used: usize,
    dtype: DType,
    first: bool,
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

    /// The tensor, in the order in which it was read, once it is on the device.
    pub fn end(mut self, shape: &[usize]) -> Result<Tensor> {
        if self.used > 0 {
            self.hand_over()?;
        }
        let (reply, tensor) = channel();
        self.placer.send(Job::End { shape: shape.to_vec(), reply })?;
        tensor.recv().map_err(|_| ended())?
    }

    fn hand_over(&mut self) -> Result<()> {
        let (values, used) = (std::mem::take(&mut self.block), std::mem::take(&mut self.used));
        self.placer.send(Job::Block { values, used, dtype: self.dtype, first: std::mem::take(&mut self.first) })
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
        fn block(&mut self, values: &[f32], dtype: DType) -> Result<Tensor> {
            self.first.send(values[0]).map_err(|_| ended())?;
            self.go_on.recv().map_err(|_| ended())?;
            if values[0] < 0.0 {
                candle_core::bail!("CUDA_ERROR_OUT_OF_MEMORY");
            }
            Tensor::from_slice(values, values.len(), &Device::Cpu)?.to_dtype(dtype)
        }

        fn settle(&mut self) -> Result<()> {
            Ok(())
        }
    }

    fn slow() -> (Placer, Receiver<f32>, Sender<()>) {
        let ((first, seen), (goes, go_on)) = (mpsc::channel(), mpsc::channel());
        (Placer::with(Slow { first, go_on }).expect("a thread"), seen, goes)
    }

    fn fill(filling: &mut Filling, elements: usize, first: f32) {
        let room = filling.room(elements).expect("room");
        room.iter_mut().enumerate().for_each(|(i, value)| *value = first + (i % 7) as f32);
    }

    #[test]
    fn a_block_is_read_while_the_one_before_it_is_copied_and_no_more_than_these_two_are_held() {
        let (placer, seen, goes) = slow();
        let (reached, arrived) = (&Mutex::new(0usize), &Condvar::new());
        std::thread::scope(|scope| {
            let reading = scope.spawn(move || {
                let mut filling = placer.begin(DType::F32);
                for block in 1..=4usize {
                    fill(&mut filling, CHUNK_ELEMENTS, block as f32);
                    *reached.lock().expect("whole") = block;
                    arrived.notify_all();
                }
                filling.end(&[2, 2, CHUNK_ELEMENTS]).expect("a tensor")
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
            let tensor = reading.join().expect("no panic");
            let of = |block: usize| {
                tensor.flatten_all().and_then(|all| all.get(block * CHUNK_ELEMENTS + 8)).and_then(|one| one.to_scalar::<f32>())
            };
            assert_eq!([0, 1, 2, 3].map(|block| of(block).expect("a number")), [2.0, 3.0, 4.0, 5.0]);
        });
    }

    #[test]
    fn small_parts_ride_together_and_a_large_one_goes_by_itself() {
        let (placer, seen, goes) = slow();
        (0..3).for_each(|_| goes.send(()).expect("it waits"));
        let mut filling = placer.begin(DType::BF16);
        fill(&mut filling, 5, 1.0);
        fill(&mut filling, 6, 10.0);
        fill(&mut filling, CHUNK_ELEMENTS, 20.0);
        fill(&mut filling, CHUNK_ELEMENTS + 1, 30.0);
        let tensor = filling.end(&[2 * CHUNK_ELEMENTS + 12]).expect("a tensor");
        assert_eq!(tensor.dtype(), DType::BF16);
        let few = tensor.narrow(0, 0, 12).and_then(|few| few.to_dtype(DType::F32)).and_then(|few| few.to_vec1::<f32>()).expect("numbers");
        assert_eq!(few, [1., 2., 3., 4., 5., 10., 11., 12., 13., 14., 15., 20.]);
        drop(placer);
        assert_eq!(seen.iter().collect::<Vec<_>>(), [1.0, 20.0, 30.0]);
    }

    #[test]
    fn a_block_that_fails_fails_its_tensor_and_not_the_next_one() {
        let (placer, seen, goes) = slow();
        (0..3).for_each(|_| goes.send(()).expect("it waits"));
        let tensor = |firsts: &[f32]| {
            let mut filling = placer.begin(DType::F32);
            firsts.iter().for_each(|first| fill(&mut filling, CHUNK_ELEMENTS, *first));
            filling.end(&[firsts.len() * CHUNK_ELEMENTS])
        };
        let failed = tensor(&[1.0, -1.0, 2.0]).expect_err("fails").to_string();
        assert!(failed.contains("CUDA_ERROR_OUT_OF_MEMORY"), "{failed}");
        assert!(tensor(&[3.0]).is_ok());
        drop(goes);
        assert!(tensor(&[4.0]).is_err(), "nobody waits for ever");
        drop(placer);
        assert_eq!(seen.iter().collect::<Vec<_>>(), [1.0, -1.0, 3.0, 4.0], "nothing is copied for a tensor that has failed");
    }

    #[test]
    fn what_is_placed_is_rounded_as_ever() {
        let values: Vec<f32> = (0..4096).map(|i| (i as f32 * 0.37).sin() * 1000f32.powf((i % 5) as f32 - 2.0)).collect();
        let mut place = OnDevice { device: Arc::new(Device::Cpu), staging: Staging::on(crate::model::Place::Cpu, 16) };
        for dtype in [DType::BF16, DType::F16, DType::F32] {
            let flat = |tensor: Tensor| tensor.to_dtype(DType::F32).and_then(|tensor| tensor.to_vec1::<f32>()).expect("numbers");
            let expected = crate::model::reading::placed(values.clone(), &[values.len()], dtype, &Device::Cpu).expect("a tensor");
            assert_eq!(flat(place.block(&values, dtype).expect("a tensor")), flat(expected), "{dtype:?}");
        }
    }
}
