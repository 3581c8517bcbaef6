use super::*;
use crate::domain::{EnsembleStats, Score};

fn score(value: f32) -> Score {
    Score::try_from(value).expect("finite")
}

fn scored_as(reward: f32) -> Scored {
    Scored { reward: score(reward), outputs: vec![], steps: vec![], tokens: 3, truncated: false, details: None }
}

fn compared(merged: f32, members: &[f32]) -> Result<Compared, Failure> {
    let members: Vec<Score> = members.iter().map(|&value| score(value)).collect();
    let stats = EnsembleStats::new(score(merged), &members, 0.5).expect("members");
    Ok(Compared { merged: scored_as(merged), members, stats })
}

fn failure() -> Failure {
    Failure::new(FailureKind::TooLong, "9 tokens")
}

#[test]
fn a_reward_is_absent_exactly_where_there_is_a_failure() {
    let zero = outcome(Ok(scored_as(0.0)));
    assert_eq!((zero.reward, zero.failure), (Some(0.0), None));
    let failed = outcome(Err(failure()));
    assert_eq!(failed.reward, None);
    assert_eq!(failed.failure.map(|failure| failure.kind()), Some(wire::failure::Kind::TooLong));
}

#[test]
fn steps_travel_with_their_places_and_outputs() {
    let steps = [(4, 0.5), (9, -1.0)].map(|(position, reward)| Step { position, reward: score(reward), outputs: vec![reward, 2.0] });
    let wired = outcome(Ok(Scored { steps: steps.to_vec(), ..scored_as(-1.0) }));
    let found: Vec<_> = wired.steps.iter().map(|step| (step.position, step.reward, step.outputs.clone())).collect();
    assert_eq!(found, [(4, 0.5, vec![0.5, 2.0]), (9, -1.0, vec![-1.0, 2.0])]);
}

#[test]
fn a_failed_completion_takes_no_part_and_keeps_its_place() {
    let group = compare_group(vec![compared(1.0, &[1.0, 5.0]), Err(failure()), compared(2.0, &[3.0, 0.0])]);
    assert_eq!((group.best_by_merged, group.best_by_mean), (Some(2), Some(0)));
    assert_eq!(group.votes, [1, 0, 1]);
    assert_eq!(group.completions[1].mean, None);
    let none = compare_group(vec![Err(failure())]);
    assert_eq!((none.best_by_merged, none.votes.as_slice()), (None, &[0][..]));
}

#[test]
fn a_pair_says_who_prefers_which_answer() {
    let pair = compare_pair(compared(1.0, &[0.0, 1.0]), compared(0.0, &[1.0, 2.0]));
    // Bradley-Terry by hand: 1 / (1 + e^-1) and 1 / (1 + e^1).
    let near = |found: Option<f32>, expected: f32| (found.expect("set") - expected).abs() < 1e-6;
    assert!(near(pair.p_chosen_merged, 0.731_058_6) && near(pair.p_chosen_mean, 0.268_941_4));
    assert_eq!((pair.votes, pair.disagree), (Some(0), Some(true)));
    let failed = compare_pair(Err(failure()), compared(0.0, &[1.0]));
    assert_eq!((failed.p_chosen_merged, failed.votes), (None, None));
}
