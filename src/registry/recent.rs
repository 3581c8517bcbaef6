//! What happened lately, for people who look at one server: bounded, newest last. Counts stand in the metrics; this has the
//! words and the times that counts do not have.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::SystemTime;

use super::ReloadOutcome;
use crate::domain::Fingerprint;
use crate::lock::lock;

/// Loads of generations that are remembered.
const RELOADS: usize = 16;
/// Calls that failed that are remembered.
const PROBLEMS: usize = 32;
/// Samples that merged model and members both scored that are remembered.
const COMPARISONS: usize = 512;
/// Words of a problem are cut here.
const MAX_WORDS: usize = 300;

/// One load of a generation.
#[derive(Clone, Debug, PartialEq)]
pub struct ReloadEvent {
    pub at: SystemTime,
    pub outcome: ReloadOutcome,
    /// Of what was loaded.
    pub fingerprint: Option<Fingerprint>,
    /// Why nothing was.
    pub problem: Option<String>,
}

/// Calls that failed in the same way, one after the other.
#[derive(Clone, Debug, PartialEq)]
pub struct Problem {
    /// The last of them.
    pub at: SystemTime,
    pub rpc: &'static str,
    pub code: &'static str,
    pub words: String,
    /// The last one's.
    pub request_id: String,
    pub count: u64,
}

/// One sample, as the merged model (WARM) and the ensemble (ENS) see it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ComparedPoint {
    pub merged: f32,
    pub mean: f32,
    pub std: f32,
}

/// Clones are handles of the same.
#[derive(Clone, Debug, Default)]
pub struct Recent(Arc<Mutex<Inner>>);

#[derive(Debug, Default)]
struct Inner {
    reloads: VecDeque<ReloadEvent>,
    problems: VecDeque<Problem>,
    comparisons: VecDeque<ComparedPoint>,
}

impl Recent {
    pub fn reloaded(&self, event: ReloadEvent) {
        let problem = event.problem.map(cut);
        push(&mut self.inner().reloads, RELOADS, ReloadEvent { problem, ..event });
    }

    pub fn failed(&self, problem: Problem) {
        let problem = Problem { words: cut(problem.words), ..problem };
        let problems = &mut self.inner().problems;
        match problems.back_mut() {
            Some(last) if (last.rpc, last.code, &last.words) == (problem.rpc, problem.code, &problem.words) => {
                let count = last.count.saturating_add(problem.count);
                *last = Problem { count, ..problem };
            }
            _ => push(problems, PROBLEMS, problem),
        }
    }

    pub fn compared(&self, points: impl IntoIterator<Item = ComparedPoint>) {
        let mut inner = self.inner();
        for point in points {
            push(&mut inner.comparisons, COMPARISONS, point);
        }
    }

    pub fn reloads(&self) -> Vec<ReloadEvent> {
        self.inner().reloads.iter().cloned().collect()
    }

    pub fn problems(&self) -> Vec<Problem> {
        self.inner().problems.iter().cloned().collect()
    }

    pub fn comparisons(&self) -> Vec<ComparedPoint> {
        self.inner().comparisons.iter().copied().collect()
    }

    fn inner(&self) -> std::sync::MutexGuard<'_, Inner> {
        // Every critical section leaves whole entries behind, so a poisoned lock is still good.
        lock(&self.0)
    }
}

fn push<T>(list: &mut VecDeque<T>, most: usize, entry: T) {
    if list.len() == most {
        list.pop_front();
    }
    list.push_back(entry);
}

fn cut(mut words: String) -> String {
    if let Some((end, _)) = words.char_indices().nth(MAX_WORDS) {
        words.truncate(end);
        words.push('…');
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problem(words: &str) -> Problem {
        let at = SystemTime::UNIX_EPOCH;
        Problem { at, rpc: "Score", code: "INTERNAL", words: words.to_owned(), request_id: String::new(), count: 1 }
    }

    #[test]
    fn the_same_problem_again_is_one_entry_that_counts() {
        let recent = Recent::default();
        for words in ["a", "a", "a", "b", "a"] {
            recent.failed(problem(words));
        }
        let seen: Vec<_> = recent.problems().into_iter().map(|problem| (problem.words, problem.count)).collect();
        assert_eq!(seen, [("a".to_owned(), 3), ("b".to_owned(), 1), ("a".to_owned(), 1)]);
    }

    #[test]
    fn it_forgets_the_oldest_and_cuts_the_longest() {
        let recent = Recent::default();
        for i in 0..100 {
            recent.failed(problem(&format!("{i}{}", "é".repeat(1000))));
            let outcome = ReloadOutcome::Failed;
            recent.reloaded(ReloadEvent { at: SystemTime::UNIX_EPOCH, outcome, fingerprint: None, problem: Some("x".repeat(1000)) });
        }
        recent.compared((0..2000).map(|i| ComparedPoint { merged: i as f32, mean: 0.0, std: 0.0 }));
        assert_eq!((recent.problems().len(), recent.reloads().len(), recent.comparisons().len()), (PROBLEMS, RELOADS, COMPARISONS));
        assert!(recent.problems().iter().all(|problem| problem.words.chars().count() == MAX_WORDS + 1));
        assert_eq!(recent.comparisons().last().map(|point| point.merged), Some(1999.0));
        assert!(recent.problems()[PROBLEMS - 1].words.starts_with("99"));
    }
}
