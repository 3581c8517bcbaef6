//! The reward head: hidden states to raw outputs and a reward, in float32, each output by one dot product in a fixed
//! order; what combines outputs is in float64.

use super::kernels::{activation, linear, norm};
use super::weights::Loader;
use super::{LoadError, Pack, StepOutput};
use crate::checkpoint::{Activation, HeadForm, HeadStage, Layout, Norm, Places, Pooling, Readout, RowKeys};

/// Where the head reads a sample: positions, in order.
pub fn positions(places: &[Option<Places>], sample: usize) -> impl Iterator<Item = usize> {
    places[sample].iter().flat_map(|places| places.read.iter().chain(&places.gate)).copied()
}

/// The same of all samples, as rows of the pack.
pub fn rows(pack: &Pack, places: &[Option<Places>]) -> Vec<u32> {
    (0..pack.len()).flat_map(|sample| positions(places, sample).map(move |position| pack.row(sample, position) as u32)).collect()
}

#[derive(Debug)]
pub struct Head {
    form: Form,
    readout: Readout,
}

#[derive(Debug)]
enum Form {
    Stages(Vec<Stage>),
    Gated {
        objectives: Vec<Stage>,
        transform: Vec<f32>,
        network: Vec<Stage>,
        scale: f32,
    },
    /// The rows that speak for, then those that speak against.
    Rows(Stage),
}

/// A linear layer, with the activation and the norm that follow it.
#[derive(Debug)]
struct Stage {
    /// `[outputs, inputs]`.
    weight: Vec<f32>,
    bias: Option<Vec<f32>>,
    activation: Option<Activation>,
    norm: Option<(Norm, Vec<f32>, Option<Vec<f32>>)>,
}

/// What a head says of one sample.
pub struct Verdict {
    pub reward: f32,
    /// Every output; of a model with steps, none beside theirs.
    pub outputs: Vec<f32>,
    pub steps: Vec<StepOutput>,
}

impl Head {
    pub fn load(layout: &Layout, readout: &Readout, loader: &mut Loader) -> Result<Self, LoadError> {
        let stages = |loader: &mut Loader, stages: &[HeadStage]| -> Result<Vec<Stage>, LoadError> {
            stages.iter().map(|stage| Stage::load(stage, loader)).collect()
        };
        let form = match &layout.head.form {
            HeadForm::Stages(keys) => Form::Stages(stages(loader, keys)?),
            HeadForm::Gated(keys) => {
                let scale = loader.host(&keys.scale)?;
                let first = HeadStage { linear: keys.objectives.clone(), activation: None, norm: None };
                Form::Gated {
                    objectives: stages(loader, std::slice::from_ref(&first))?,
                    transform: loader.host(&keys.transform)?,
                    network: stages(loader, &keys.network)?,
                    scale: scale.first().copied().unwrap_or(f32::NAN),
                }
            }
            HeadForm::Rows(keys) => Form::Rows(Stage::rows(keys, readout, loader)?),
        };
        Ok(Self { form, readout: readout.clone() })
    }

    /// Of one sample: `hidden` has the states of [`Places::read`], in order, and then that of [`Places::gate`].
    pub fn forward(&self, places: &Places, hidden: &[Vec<f32>]) -> Verdict {
        let (read, gate) = hidden.split_at(places.read.len());
        if self.readout.step.is_some() {
            return self.steps(places, read);
        }
        let outputs = match read {
            [one] => self.outputs(one),
            // More than one without steps is the mean.
            all => self.outputs(&mean(all)),
        };
        let reward = match (&self.form, gate.first()) {
            (Form::Gated { transform, network, scale, .. }, Some(prompt)) => {
                gated(&outputs, transform, &run(network, prompt), *scale, self.readout.temperature)
            }
            _ => self.readout.combine(&outputs),
        };
        Verdict { reward: reward as f32, outputs, steps: Vec::new() }
    }

    fn steps(&self, places: &Places, read: &[Vec<f32>]) -> Verdict {
        let mut scores = Vec::with_capacity(read.len());
        let steps = places.read.iter().zip(read).map(|(&position, hidden)| {
            let outputs = self.outputs(hidden);
            let score = self.readout.combine(&outputs);
            scores.push(score);
            StepOutput { position, reward: score as f32, outputs }
        });
        let steps = steps.collect();
        Verdict { reward: self.readout.reduce.apply(&scores) as f32, outputs: Vec::new(), steps }
    }

    fn outputs(&self, hidden: &[f32]) -> Vec<f32> {
        match &self.form {
            Form::Stages(stages) => run(stages, hidden),
            Form::Gated { objectives, .. } => run(objectives, hidden),
            Form::Rows(stage) => {
                let logits = stage.run(hidden);
                let logits = logits.into_iter().map(|logit| {
                    let logit = f64::from(logit);
                    self.readout.softcap.map_or(logit, |cap| (logit / cap).tanh() * cap)
                });
                let logits: Vec<f64> = logits.collect();
                let (plus, minus) = logits.split_at(self.readout.plus.len());
                [plus, minus].into_iter().filter(|rows| !rows.is_empty()).map(|rows| log_sum_exp(rows) as f32).collect()
            }
        }
    }

    /// Whether the head reads the mean of a sample's hidden states.
    pub fn reads_the_mean(&self) -> bool {
        self.readout.step.is_none() && self.readout.pooling == Pooling::Mean
    }

    pub fn readout(&self) -> &Readout {
        &self.readout
    }
}

impl Stage {
    fn load(keys: &HeadStage, loader: &mut Loader) -> Result<Self, LoadError> {
        let bias = keys.linear.bias.as_deref().map(|bias| loader.host(bias)).transpose()?;
        let norm = match &keys.norm {
            None => None,
            Some((kind, norm)) => {
                let bias = norm.bias.as_deref().map(|bias| loader.host(bias)).transpose()?;
                Some((*kind, loader.host(&norm.weight)?, bias))
            }
        };
        Ok(Self { weight: loader.host(&keys.linear.weight)?, bias, activation: keys.activation, norm })
    }

    /// The named rows of a language-model head, which is never loaded whole.
    fn rows(keys: &RowKeys, readout: &Readout, loader: &mut Loader) -> Result<Self, LoadError> {
        let (mut weight, mut bias) = (Vec::new(), Vec::new());
        for &id in readout.plus.iter().chain(&readout.minus) {
            let id = id as usize;
            weight.extend(loader.part(&keys.weight, id * keys.hidden..(id + 1) * keys.hidden)?);
            if let Some(name) = &keys.bias {
                bias.extend(loader.part(name, id..id + 1)?);
            }
        }
        Ok(Self { weight, bias: keys.bias.is_some().then_some(bias), activation: None, norm: None })
    }

    fn run(&self, x: &[f32]) -> Vec<f32> {
        let mut y = linear::project(x, &self.weight, self.bias.as_deref());
        let width = y.len();
        if let Some(kind) = self.activation {
            activation::activate(kind, &mut y, width);
        }
        if let Some((kind, weight, bias)) = &self.norm {
            let mut normed = vec![0.0; width];
            norm::normalise(*kind, &y, width, weight, bias.as_deref(), &mut normed);
            y = normed;
        }
        y
    }
}

fn run(stages: &[Stage], x: &[f32]) -> Vec<f32> {
    let Some((first, rest)) = stages.split_first() else { return Vec::new() };
    rest.iter().fold(first.run(x), |x, stage| stage.run(&x))
}

/// The mean over tokens, in the order of the tokens, so that it does not depend on what else is in the pack.
fn mean(states: &[Vec<f32>]) -> Vec<f32> {
    let mut sum = vec![0.0f64; states.first().map_or(0, Vec::len)];
    for state in states {
        for (sum, value) in sum.iter_mut().zip(state) {
            *sum += f64::from(*value);
        }
    }
    sum.into_iter().map(|sum| (sum / states.len() as f64) as f32).collect()
}

/// The objectives, transformed, weighted by `softmax(logits / temperature) * scale`.
fn gated(objectives: &[f32], transform: &[f32], logits: &[f32], scale: f32, temperature: f64) -> f64 {
    let count = objectives.len();
    let adjusted = (0..count).map(|column| {
        let terms =
            objectives.iter().enumerate().map(|(row, objective)| f64::from(*objective) * f64::from(transform[row * count + column]));
        terms.sum::<f64>()
    });
    let logits: Vec<f64> = logits.iter().map(|logit| f64::from(*logit) / temperature).collect();
    let total = log_sum_exp(&logits);
    let weights = logits.iter().map(|logit| (logit - total).exp() * f64::from(scale));
    adjusted.zip(weights).map(|(objective, weight)| objective * weight).sum()
}

/// The logarithm of the sum of exponentials; of one value, that value.
fn log_sum_exp(values: &[f64]) -> f64 {
    let most = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    if values.len() == 1 || !most.is_finite() {
        return values.iter().sum();
    }
    most + values.iter().map(|value| (value - most).exp()).sum::<f64>().ln()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_gate_of_a_worked_example() {
        // Transform [[1, 1], [0, 2]]: objectives (3, 1) become (3, 5). Gate: softmax((0, ln 3)) = (1/4, 3/4), times 2.
        let logits = [0.0, 3f32.ln() * 10.0];
        let found = gated(&[3.0, 1.0], &[1.0, 1.0, 0.0, 2.0], &logits, 2.0, 10.0);
        assert!((found - 2.0 * (3.0 / 4.0 + 5.0 * 3.0 / 4.0)).abs() < 1e-6, "{found}");
    }

    #[test]
    fn a_nan_among_logits_is_never_summed_away() {
        assert!(log_sum_exp(&[f64::NAN, 1.0]).is_nan());
        assert!(log_sum_exp(&[1.0, f64::NAN]).is_nan());
        assert!(gated(&[1.0, 1.0], &[1.0, 0.0, 0.0, 1.0], &[f32::NAN, 0.0], 1.0, 10.0).is_nan());
    }

    proptest! {
        #[test]
        fn log_sum_exp_agrees_with_its_definition(values in prop::collection::vec(-20.0f64..20.0, 1..6), shift in -500.0f64..500.0) {
            let exact = values.iter().map(|value| value.exp()).sum::<f64>().ln() + shift;
            let shifted: Vec<f64> = values.iter().map(|value| value + shift).collect();
            prop_assert!((log_sum_exp(&shifted) - exact).abs() < 1e-9);
        }
    }
}
