//! The names of devices, and what this machine has of them.

use std::fmt;
use std::str::FromStr;

use super::cards::Support;
use super::{Arithmetic, cuda, flash, guarded};
use crate::checkpoint::{Architecture, Dtype};
use crate::model::memory::Way;
use candle_core::DType;

/// More devices than any machine has.
const MOST_PLACES: usize = 64;

/// One device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Place {
    Cpu,
    Cuda(usize),
    Metal(usize),
}

/// Where the settings want the model to be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum DeviceChoice {
    /// The first CUDA device, where this build and this machine have one; else the CPU.
    #[default]
    Auto,
    /// At least one, all of one kind: scores of different kinds of device differ in their last digits.
    Places(Vec<Place>),
}

/// A device that cannot be used, in words for its operator.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, thiserror::Error)]
#[error("device {place}: {problem}")]
pub struct DeviceError {
    pub place: String,
    pub problem: String,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
            Self::Metal(ordinal) => write!(f, "metal:{ordinal}"),
        }
    }
}

impl FromStr for Place {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (kind, ordinal) = text.split_once(':').unwrap_or((text, "0"));
        // Digits alone: `+1` parses as a number, too.
        let ordinal = ordinal.parse().ok().filter(|_| ordinal.len() <= 3 && ordinal.bytes().all(|byte| byte.is_ascii_digit()));
        match (kind, ordinal) {
            ("cpu", _) if text == "cpu" => Ok(Self::Cpu),
            ("cuda", Some(ordinal)) => Ok(Self::Cuda(ordinal)),
            ("metal", Some(ordinal)) => Ok(Self::Metal(ordinal)),
            _ => Err("expected auto, cpu, cuda:0, or a list such as [cuda:0, cuda:1]".to_owned()),
        }
    }
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.trim() == "auto" {
            return Ok(Self::Auto);
        }
        let list = text.trim();
        let list = list.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(list);
        let places: Vec<Place> = list.split(',').map(|name| name.trim().trim_matches('"').parse()).collect::<Result<_, _>>()?;
        if places.len() > MOST_PLACES {
            return Err(format!("expected at most {MOST_PLACES} devices"));
        }
        if places.iter().any(|place| std::mem::discriminant(place) != std::mem::discriminant(&places[0])) {
            return Err("expected devices of one kind, because scores differ between kinds in their last digits".to_owned());
        }
        // The CPU may stand there more than once: workers that share their weights.
        let twice = places.iter().enumerate().find(|(i, place)| **place != Place::Cpu && places[..*i].contains(place));
        match twice {
            Some((_, place)) => Err(format!("expected every device once; {place} stands there twice")),
            None => Ok(Self::Places(places)),
        }
    }
}

impl DeviceChoice {
    /// The devices that are meant, of which the driver says that they are there.
    pub fn resolve(&self) -> Result<Vec<Place>, DeviceError> {
        match self {
            Self::Auto => Ok(vec![if guarded(cuda::count).is_ok_and(|count| count > 0) { Place::Cuda(0) } else { Place::Cpu }]),
            Self::Places(places) => {
                for place in places {
                    place.check()?;
                }
                Ok(places.clone())
            }
        }
    }
}

impl Place {
    pub(super) fn error(self, problem: impl Into<String>) -> DeviceError {
        DeviceError { place: self.to_string(), problem: problem.into() }
    }

    pub(super) fn check(self) -> Result<(), DeviceError> {
        let support = Support::of_this_build();
        match self {
            Self::Cpu => Ok(()),
            Self::Metal(_) if support.metal => Ok(()),
            Self::Metal(_) => Err(self.error("this build has no Metal; build with `--features metal`, which nobody has tested")),
            // No card is touched: those of others are none of our business.
            Self::Cuda(ordinal) => match guarded(cuda::count) {
                Err(problem) => Err(self.error(problem)),
                Ok(count) if ordinal >= count => {
                    let count = if count == 1 { "one CUDA device".to_owned() } else { format!("{count} CUDA devices") };
                    Err(self.error(format!("this machine has {count}, counted from 0")))
                }
                Ok(_) => Ok(()),
            },
        }
    }

    /// How a model would be computed there by this build; whether flash attention is right is found when it is loaded.
    pub fn way(self, arithmetic: Arithmetic, architecture: &Architecture) -> Way {
        let weights = if arithmetic.dtype == Dtype::F32 { DType::F32 } else { DType::BF16 };
        match self {
            Self::Cpu => Way::Kernels,
            Self::Cuda(_) if flash::BUILT && flash::covers(architecture.head_dim, architecture.disentangled.is_some(), weights) => {
                Way::Flash
            }
            Self::Cuda(_) | Self::Metal(_) => Way::Plain,
        }
    }

    /// Tokens of a pack beyond which more would make nothing faster, and every caller wait longer.
    pub fn enough_pack_tokens(self) -> usize {
        if self == Self::Cpu { 8192 } else { 16_384 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn choice(text: &str) -> Result<DeviceChoice, String> {
        text.parse()
    }

    #[test]
    fn devices_are_named_alone_or_in_a_list() {
        let places = |places: &[Place]| Ok(DeviceChoice::Places(places.to_vec()));
        assert_eq!(choice("auto"), Ok(DeviceChoice::Auto));
        assert_eq!(choice("cpu"), places(&[Place::Cpu]));
        assert_eq!(choice("cuda"), places(&[Place::Cuda(0)]));
        assert_eq!(choice("cuda:7"), places(&[Place::Cuda(7)]));
        assert_eq!(choice("[cuda:0, cuda:1]"), places(&[Place::Cuda(0), Place::Cuda(1)]));
        assert_eq!(choice("[\"cuda:0\",\"cuda:1\"]"), places(&[Place::Cuda(0), Place::Cuda(1)]));
        assert_eq!(choice("cuda:0,cuda:1"), choice("[cuda:0, cuda:1]"));
        assert_eq!(choice("[cpu, cpu]"), places(&[Place::Cpu, Place::Cpu]));
    }

    #[test]
    fn what_is_no_device_is_refused_with_what_was_expected() {
        for text in ["", "gpu", "cuda:", "cuda:-1", "cuda:+1", "cuda:1234", "cpu:1", "[]", "[cuda:0", "cuda:0;cuda:1"] {
            assert!(choice(text).is_err_and(|problem| problem.contains("expected auto, cpu, cuda:0")), "{text}");
        }
        assert!(choice("[cuda:0, cuda:0]").is_err_and(|problem| problem.contains("cuda:0 stands there twice")));
        assert!(choice("[cpu, cuda:0]").is_err_and(|problem| problem.contains("of one kind")));
    }

    proptest! {
        #[test]
        fn any_text_is_parsed_or_refused_and_a_name_is_its_own(text in ".{0,40}", ordinal in 0usize..1000) {
            let _ = choice(&text);
            prop_assert_eq!(Place::Cuda(ordinal).to_string().parse(), Ok(Place::Cuda(ordinal)));
        }
    }

    #[test]
    fn a_device_that_is_not_there_is_told_in_a_sentence() {
        assert_eq!(DeviceChoice::Places(vec![Place::Cpu; 2]).resolve(), Ok(vec![Place::Cpu; 2]));
        // No machine has a thousand cards, whether this build knows of any or not.
        let refused = DeviceChoice::Places(vec![Place::Cuda(999)]).resolve().expect_err("no such card").to_string();
        assert!(refused.starts_with("device cuda:999: "), "{refused}");
        assert!(
            ["this build has no CUDA", "this machine has", "no NVIDIA driver"].iter().any(|words| refused.contains(words)),
            "{refused}"
        );
    }
}
