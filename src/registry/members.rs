//! What is known of a generation's members beside their weights: where their rewards lie, and how to get at one that does
//! not stand on the device.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use super::generation::Generation;
use super::{Calibration, EngineError};
use crate::domain::{MemberName, MemberScale, Moments, Score};
use crate::lock::lock;
use crate::model::RewardModel;

/// Members that are loaded when they are asked for, and freed right after.
pub trait StreamedMembers: Send + Sync {
    /// Loads one of `GenerationInfo::members`, by its place. Blocks for as long as it takes.
    fn load(&self, index: usize) -> Result<Arc<dyn RewardModel>, String>;
}

/// Where the rewards of one model lie, seen while it scored.
#[derive(Debug, Default)]
pub struct Running(Mutex<Seen>);

#[derive(Debug, Default)]
struct Seen {
    merged: Moments,
    members: BTreeMap<MemberName, Moments>,
}

impl Running {
    /// Adds one sample that the merged model and these members scored, raw.
    pub fn push<'a>(&self, merged: Score, members: impl IntoIterator<Item = (&'a MemberName, Score)>) {
        let mut seen = lock(&self.0);
        seen.merged.push(f64::from(merged.get()));
        for (name, reward) in members {
            match seen.members.get_mut(name) {
                Some(moments) => moments.push(f64::from(reward.get())),
                None => _ = seen.members.insert(name.clone(), Moments::of([f64::from(reward.get())])),
            }
        }
    }

    fn merged(&self) -> Moments {
        lock(&self.0).merged
    }

    fn member(&self, name: &MemberName) -> Moments {
        lock(&self.0).members.get(name).copied().unwrap_or_default()
    }
}

/// Where the statistics of a scale come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScaleSource {
    /// Raw rewards need none.
    None,
    /// Measured on a reference set: the same numbers for every call.
    Calibration,
    /// What this process has seen of this generation: they move with the traffic.
    Running,
}

impl ScaleSource {
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Calibration => "calibration",
            Self::Running => "running",
        }
    }
}

/// Samples after which running statistics are good enough to scale by.
pub const MIN_RUNNING: u64 = 256;

/// The scale of one comparison: mean and standard deviation of the merged model and of each member that takes part.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Scales {
    pub source: ScaleSource,
    scale: MemberScale,
    merged: (f64, f64),
    members: Vec<(f64, f64)>,
}

impl Scales {
    /// All statistics of one source: calibrations where everybody has one, else what has been seen so far.
    pub fn new(generation: &Generation, members: &[MemberName], scale: MemberScale) -> Result<Self, EngineError> {
        if scale == MemberScale::Raw {
            let nothing = vec![(0.0, 1.0); members.len()];
            return Ok(Self { source: ScaleSource::None, scale, merged: (0.0, 1.0), members: nothing });
        }
        let calibrated = |calibration: Option<&Calibration>| calibration.map(|calibration| (calibration.mean(), calibration.std()));
        let of_members = members.iter().map(|name| calibrated(generation.member_calibrations.get(name)));
        if let (Some(merged), Some(members)) = (calibrated(generation.calibration.as_ref()), of_members.collect()) {
            return Ok(Self { source: ScaleSource::Calibration, scale, merged, members });
        }
        let seen = |who: &str, moments: Moments| match (moments.mean(), moments.std()) {
            (Some(mean), Some(std)) if moments.count() >= MIN_RUNNING && (std > 0.0 || scale == MemberScale::Centered) => Ok((mean, std)),
            _ => Err(EngineError::ScaleMissing { who: who.to_owned(), seen: moments.count() }),
        };
        let merged = seen("the merged model", generation.running.merged())?;
        let members = members.iter().map(|name| seen(&format!("member {name}"), generation.running.member(name)));
        Ok(Self { source: ScaleSource::Running, scale, merged, members: members.collect::<Result<_, _>>()? })
    }

    /// The merged model's raw reward in this scale. May leave the range of float32, so it is checked again.
    pub fn merged(&self, raw: Score) -> Result<Score, crate::domain::NonFinite> {
        self.apply(raw, self.merged)
    }

    /// The raw reward of the member at this place in this scale.
    pub fn member(&self, place: usize, raw: Score) -> Result<Score, crate::domain::NonFinite> {
        self.members.get(place).map_or(Ok(raw), |&statistics| self.apply(raw, statistics))
    }

    fn apply(&self, raw: Score, (mean, std): (f64, f64)) -> Result<Score, crate::domain::NonFinite> {
        match self.scale {
            // Not even a rounding lies between.
            MemberScale::Raw => Ok(raw),
            scale => Score::try_from(scale.apply(f64::from(raw.get()), mean, std) as f32),
        }
    }
}
