//! Every way of merging is, per tensor, one linear combination of the members and init; here are its coefficients. Pure,
//! in float64, each operation rounded by itself, sine and arc cosine by the crate `libm`: the same bits on every machine.

/// A task vector shorter than this has no direction.
pub const SHORTEST: f64 = 1e-12;
/// An angle whose sine is smaller than this gives no arc: the two vectors lie on one line.
pub const FLATTEST: f64 = 1e-6;

/// What each source is multiplied with: the members in order, and init.
#[derive(Clone, Debug, PartialEq)]
pub struct Combination {
    pub members: Vec<f64>,
    pub init: f64,
}

impl Combination {
    /// `Σ c_m φ_m`.
    pub fn of_members(coefficients: &[f64]) -> Self {
        Self { members: coefficients.to_vec(), init: 0.0 }
    }

    /// One member as it is.
    pub fn one(count: usize, member: usize) -> Self {
        Self { members: (0..count).map(|index| f64::from(u8::from(index == member))).collect(), init: 0.0 }
    }

    /// Init as it is.
    pub fn init(count: usize) -> Self {
        Self { members: vec![0.0; count], init: 1.0 }
    }

    /// `init + Σ a_m δ_m` over task vectors `δ_m = φ_m − init`.
    pub fn of_task_vectors(coefficients: &[f64]) -> Self {
        let sum = coefficients.iter().fold(0.0, |sum, a| sum + a);
        Self { members: coefficients.to_vec(), init: 1.0 - sum }
    }

    /// `init + η (merged − init)` (WARP §3.3).
    pub fn towards(self, eta: f64) -> Self {
        Self { members: self.members.iter().map(|c| eta * c).collect(), init: (1.0 - eta) + eta * self.init }
    }

    /// Sources and coefficients in the order in which they are summed: members in order, then init (whose place is their
    /// number). What is multiplied by zero is not read.
    pub fn parts(&self) -> Vec<(usize, f64)> {
        self.members.iter().chain([&self.init]).copied().enumerate().filter(|(_, coefficient)| *coefficient != 0.0).collect()
    }
}

/// The coefficients of `a ← (1−μ) a + μ φ_m`, from the first member on (WARP §3.1).
pub fn ema(count: usize, mu: f64) -> Vec<f64> {
    let mut coefficients = Vec::with_capacity(count);
    for member in 0..count {
        coefficients.iter_mut().for_each(|c| *c *= 1.0 - mu);
        coefficients.push(if member == 0 { 1.0 } else { mu });
    }
    coefficients
}

/// The products `δ_i · δ_j` of task vectors, for `j <= i`.
#[derive(Clone, Debug, PartialEq)]
pub struct Gram {
    count: usize,
    /// Row by row: 00, 10, 11, 20, 21, 22, ...
    products: Vec<f64>,
}

impl Gram {
    /// As many products as `pairs` gives for `count` vectors.
    pub fn zero(count: usize) -> Self {
        Self { count, products: vec![0.0; count * (count + 1) / 2] }
    }

    pub fn count(&self) -> usize {
        self.count
    }

    /// The places of all products, in the order of [`Gram::add`].
    pub fn pairs(count: usize) -> impl Iterator<Item = (usize, usize)> {
        (0..count).flat_map(|i| (0..=i).map(move |j| (i, j)))
    }

    pub fn add(&mut self, products: &[f64]) {
        self.products.iter_mut().zip(products).for_each(|(sum, product)| *sum += product);
    }

    pub fn get(&self, i: usize, j: usize) -> f64 {
        let (i, j) = if i < j { (j, i) } else { (i, j) };
        self.products.get(i * (i + 1) / 2 + j).copied().unwrap_or_default()
    }

    pub fn is_finite(&self) -> bool {
        self.products.iter().all(|product| product.is_finite())
    }

    /// Of one task vector.
    pub fn norm(&self, i: usize) -> f64 {
        self.get(i, i).sqrt()
    }

    /// Of two task vectors; `None` where one of them has no direction.
    pub fn cosine(&self, i: usize, j: usize) -> Option<f64> {
        let (a, b) = (self.norm(i), self.norm(j));
        (a >= SHORTEST && b >= SHORTEST).then(|| (self.get(i, j) / (a * b)).clamp(-1.0, 1.0))
    }
}

/// One step of the iteration: the vector so far, and the next member.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Step {
    /// Along the arc, at this angle in radians.
    Arc(f64),
    /// Along the line, because one of the two vectors is shorter than `SHORTEST`.
    NoDirection,
    /// Along the line, because the two lie on one line: the sine of their angle is below `FLATTEST`.
    OneLine,
}

/// The coefficients of task vectors under iterated SLERP, and what happened at each step (WARP §3.2, Eq. 26): the first
/// two with `t`, the `m`-th after that with `1/m`. Partial results are combinations of the task vectors, so every angle
/// follows from their Gram matrix.
pub fn slerp(gram: &Gram, t: f64) -> (Vec<f64>, Vec<Step>) {
    let count = gram.count();
    let mut so_far = vec![0.0; count];
    let mut steps = Vec::new();
    if let Some(first) = so_far.first_mut() {
        *first = 1.0;
    }
    for next in 1..count {
        let t = if count == 2 { t } else { 1.0 / (next + 1) as f64 };
        let (mut squared, mut dot) = (0.0, 0.0);
        for (i, a) in so_far.iter().enumerate().take(next) {
            for (j, b) in so_far.iter().enumerate().take(next) {
                squared += a * b * gram.get(i, j);
            }
            dot += a * gram.get(i, next);
        }
        let step = step(squared.max(0.0).sqrt(), gram.norm(next), dot);
        let (keep, add) = match step {
            Step::Arc(angle) => (libm::sin((1.0 - t) * angle) / libm::sin(angle), libm::sin(t * angle) / libm::sin(angle)),
            Step::NoDirection | Step::OneLine => (1.0 - t, t),
        };
        so_far.iter_mut().for_each(|a| *a *= keep);
        if let Some(a) = so_far.get_mut(next) {
            *a = add;
        }
        steps.push(step);
    }
    (so_far, steps)
}

fn step(norm: f64, next: f64, dot: f64) -> Step {
    if norm < SHORTEST || next < SHORTEST {
        return Step::NoDirection;
    }
    let angle = libm::acos((dot / (norm * next)).clamp(-1.0, 1.0));
    if libm::sin(angle) < FLATTEST { Step::OneLine } else { Step::Arc(angle) }
}

#[cfg(test)]
#[path = "combine_tests.rs"]
mod tests;
