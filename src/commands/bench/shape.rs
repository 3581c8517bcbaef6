//! What is sent: every request is a pure function of the seed and its number.

use std::fmt;
use std::str::FromStr;

use serde::Deserialize;

use super::random::Random;
use crate::client::{group_to_wire, sample_to_wire};
use crate::offline::{Input, parse_line};
use crate::wire;

/// A whole number, or an inclusive range that one is drawn from: `512`, `32..512`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Span {
    pub least: u32,
    pub most: u32,
}

impl FromStr for Span {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (least, most) = text.split_once("..").unwrap_or((text, text));
        let number = |text: &str| text.parse::<u32>().ok();
        match (number(least), number(most)) {
            (Some(least), Some(most)) if least <= most && most <= 1 << 24 => Ok(Self { least, most }),
            _ => Err("expected a number of tokens such as 512, or a range such as 32..512".to_owned()),
        }
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.least == self.most { write!(f, "{}", self.least) } else { write!(f, "{}..{}", self.least, self.most) }
    }
}

impl Span {
    fn draw(self, random: &mut Random) -> u32 {
        self.least + random.below(self.most - self.least + 1)
    }
}

/// One prompt with its completions, as they are to be sent.
#[derive(Clone, Debug, PartialEq)]
enum Group {
    /// So many random tokens each.
    Lengths { prompt: Span, completions: Vec<Span> },
    /// As they stand in a file.
    Given(Input),
}

impl Group {
    fn completions(&self) -> usize {
        match self {
            Self::Lengths { completions, .. } => completions.len(),
            Self::Given(Input::Group(group)) => group.completions().len(),
            Self::Given(Input::One(_)) => 1,
            Self::Given(Input::Preference(_)) => 2,
        }
    }
}

/// What a load consists of.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Shape {
    /// Sent in turn, over and over.
    groups: Vec<Group>,
    /// Of the group that a request's number falls on, once every request carries one completion: the first request of
    /// each group, and their number in all.
    singles: Option<(Vec<u64>, u64)>,
    vocabulary: u32,
    seed: u64,
}

/// Lengths as a line of a file gives them.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Lengths {
    prompt_tokens: u32,
    completion_tokens: OneOrMany,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(u32),
    Many(Vec<u32>),
}

impl Shape {
    /// Groups of random tokens below `vocabulary`, all of one kind.
    pub(super) fn random(prompt: Span, completion: Span, group: usize, vocabulary: u32, seed: u64) -> Self {
        Self { groups: vec![Group::Lengths { prompt, completions: vec![completion; group] }], singles: None, vocabulary, seed }
    }

    /// One group a line: `{"prompt_tokens", "completion_tokens": N | [N, ...]}` for random tokens of these lengths, or any
    /// line that `warm score` reads.
    pub(super) fn from_lines(text: &str, vocabulary: u32, seed: u64) -> Result<Self, String> {
        let mut groups = Vec::new();
        for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
            let group = group(line).map_err(|problem| format!("line {}: {problem}", number + 1))?;
            groups.push(group);
        }
        if groups.is_empty() {
            Err("expected at least one line, found none".to_owned())
        } else {
            Ok(Self { groups, singles: None, vocabulary, seed })
        }
    }

    /// The same load with every completion in a request of its own, as trainers send them that score each sample as it
    /// is finished.
    pub(super) fn singly(self) -> Self {
        let mut total = 0;
        let mut starts = Vec::with_capacity(self.groups.len());
        for group in &self.groups {
            starts.push(total);
            total += group.completions() as u64;
        }
        Self { singles: Some((starts, total)), ..self }
    }

    /// The longest sample that may be drawn; 0 where texts decide.
    pub(super) fn longest(&self) -> u32 {
        let longest = |group: &Group| match group {
            Group::Lengths { prompt, completions } => {
                prompt.most.saturating_add(completions.iter().map(|completion| completion.most).max().unwrap_or(0))
            }
            Group::Given(_) => 0,
        };
        self.groups.iter().map(longest).max().unwrap_or(0)
    }

    /// The request of this number.
    pub(super) fn request(&self, number: u64) -> wire::ScoreRequest {
        let count = self.groups.len() as u64;
        match &self.singles {
            None => self.group_request(number, (number % count) as usize),
            Some((starts, total)) => {
                let (round, place) = (number / total, number % total);
                let index = starts.partition_point(|&start| start <= place) - 1;
                self.single_request(round * count + index as u64, index, (place - starts[index]) as usize)
            }
        }
    }

    /// `number` tells apart the rounds in which the same lengths are drawn again.
    fn group_request(&self, number: u64, index: usize) -> wire::ScoreRequest {
        match &self.groups[index] {
            Group::Lengths { prompt, completions } => {
                let kind = |ids| wire::completion::Kind::Tokens(wire::TokenIds { ids });
                let completion = |(i, span): (usize, &Span)| wire::Completion { kind: Some(kind(self.ids(*span, number, i as u64 + 1))) };
                let completions = completions.iter().enumerate().map(completion).collect();
                let prompt = wire::prompt_group::Prompt::Tokens(wire::TokenIds { ids: self.ids(*prompt, number, 0) });
                groups(wire::PromptGroup { prompt: Some(prompt), completions })
            }
            Group::Given(Input::Group(group)) => groups(group_to_wire(group)),
            Group::Given(Input::One(sample)) => samples(sample_to_wire(sample)),
            Group::Given(Input::Preference(pair)) => {
                wire::ScoreRequest { samples: [&pair.chosen, &pair.rejected].map(sample_to_wire).into(), ..Default::default() }
            }
        }
    }

    fn single_request(&self, number: u64, index: usize, completion: usize) -> wire::ScoreRequest {
        match &self.groups[index] {
            Group::Lengths { prompt, completions } => {
                let mut ids = self.ids(*prompt, number, 0);
                ids.extend(self.ids(completions[completion], number, completion as u64 + 1));
                samples(wire::Sample { input: Some(wire::sample::Input::Tokens(wire::TokenIds { ids })) })
            }
            Group::Given(Input::Group(group)) => {
                group.samples().nth(completion).map_or_else(Default::default, |sample| samples(sample_to_wire(&sample)))
            }
            Group::Given(Input::One(sample)) => samples(sample_to_wire(sample)),
            Group::Given(Input::Preference(pair)) => samples(sample_to_wire(if completion == 0 { &pair.chosen } else { &pair.rejected })),
        }
    }

    fn ids(&self, span: Span, number: u64, part: u64) -> Vec<u32> {
        let mut random = Random::new(self.seed, (number, part));
        let length = span.draw(&mut random);
        (0..length).map(|_| random.below(self.vocabulary.max(1))).collect()
    }
}

fn group(line: &str) -> Result<Group, String> {
    if !line.contains("\"prompt_tokens\"") {
        return parse_line(line).map(|item| Group::Given(item.input)).map_err(|error| error.to_string());
    }
    let lengths: Lengths = serde_json::from_str(line).map_err(|error| error.to_string())?;
    let fixed = |tokens: u32| Span { least: tokens, most: tokens };
    let completions = match lengths.completion_tokens {
        OneOrMany::One(tokens) => vec![fixed(tokens)],
        OneOrMany::Many(tokens) => tokens.into_iter().map(fixed).collect(),
    };
    if completions.is_empty() {
        return Err("completion_tokens: expected at least one".to_owned());
    }
    Ok(Group::Lengths { prompt: fixed(lengths.prompt_tokens), completions })
}

fn groups(group: wire::PromptGroup) -> wire::ScoreRequest {
    wire::ScoreRequest { groups: vec![group], ..Default::default() }
}

fn samples(sample: wire::Sample) -> wire::ScoreRequest {
    wire::ScoreRequest { samples: vec![sample], ..Default::default() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn span() -> impl Strategy<Value = Span> {
        (1u32..40, 0u32..40).prop_map(|(least, more)| Span { least, most: least + more })
    }

    /// Every sample of a request as the token ids that the server would score.
    fn scored(request: &wire::ScoreRequest) -> Vec<Vec<u32>> {
        let single = |sample: &wire::Sample| match &sample.input {
            Some(wire::sample::Input::Tokens(tokens)) => tokens.ids.clone(),
            other => panic!("{other:?}"),
        };
        let grouped = request.groups.iter().flat_map(|group| {
            let Some(wire::prompt_group::Prompt::Tokens(prompt)) = &group.prompt else { panic!("tokens") };
            group.completions.iter().map(|completion| match &completion.kind {
                Some(wire::completion::Kind::Tokens(tokens)) => [&prompt.ids[..], &tokens.ids].concat(),
                other => panic!("{other:?}"),
            })
        });
        request.samples.iter().map(single).chain(grouped).collect()
    }

    #[test]
    fn spans_are_numbers_or_ranges() {
        assert_eq!("512".parse(), Ok(Span { least: 512, most: 512 }));
        assert_eq!("32..512".parse(), Ok(Span { least: 32, most: 512 }));
        for bad in ["", "x", "5..", "..5", "9..3", "-1", "1..99999999999"] {
            assert!(bad.parse::<Span>().is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn requests_have_the_lengths_and_ids_that_were_asked_for_and_are_the_same_again(
            prompt in span(), completion in span(), group in 1usize..9, vocabulary in 1u32..50, seed in any::<u64>(), number in 0u64..1000,
        ) {
            let shape = Shape::random(prompt, completion, group, vocabulary, seed);
            let request = shape.request(number);
            prop_assert_eq!(&request, &shape.request(number));
            let samples = scored(&request);
            prop_assert_eq!(samples.len(), group);
            for ids in &samples {
                prop_assert!((prompt.least + completion.least..=prompt.most + completion.most).contains(&(ids.len() as u32)));
                prop_assert!(ids.len() as u32 <= shape.longest() && ids.iter().all(|id| *id < vocabulary));
            }
        }

        #[test]
        fn the_same_samples_come_in_groups_and_singly(
            sizes in prop::collection::vec(prop::collection::vec(1u32..20, 1..5), 1..5), seed in any::<u64>(), rounds in 1u64..4,
        ) {
            let lines: Vec<String> = sizes.iter().map(|sizes| format!("{{\"prompt_tokens\": 7, \"completion_tokens\": {sizes:?}}}")).collect();
            let shape = Shape::from_lines(&lines.join("\n"), 30, seed).expect("valid");
            let together: Vec<_> = (0..rounds * sizes.len() as u64).flat_map(|number| scored(&shape.request(number))).collect();
            let each = shape.singly();
            let apart: Vec<_> = (0..together.len() as u64).flat_map(|number| scored(&each.request(number))).collect();
            prop_assert_eq!(together, apart);
        }
    }

    #[test]
    fn files_hold_lengths_or_what_warm_score_reads() {
        let shape = Shape::from_lines("{\"text\": \"a\"}\n\n{\"prompt_tokens\": 3, \"completion_tokens\": 2}\n", 10, 0).expect("valid");
        assert_eq!(shape.request(0).samples[0].input, Some(wire::sample::Input::Text("a".into())));
        assert_eq!(scored(&shape.request(1))[0].len(), 5);
        assert_eq!(shape.request(2), shape.request(0));
        for (text, words) in [
            ("", "at least one line"),
            ("{\"text\": \"a\"}\n{\"txt\": 1}", "line 2"),
            ("{\"prompt_tokens\": 3}", "completion_tokens"),
            ("{\"prompt_tokens\": 3, \"completion_tokens\": []}", "at least one"),
        ] {
            let error = Shape::from_lines(text, 10, 0).expect_err("invalid");
            assert!(error.contains(words), "{error}");
        }
    }
}
