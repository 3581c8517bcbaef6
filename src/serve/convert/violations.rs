//! The collected mistakes of one request, and the paths that name their fields.

use std::fmt;

/// More violations than these are counted, not listed: details travel in HTTP/2 trailers, where clients take 8 to 16 kB.
const MAX_LISTED: usize = 16;
const MAX_LISTED_BYTES: usize = 4096;
const MAX_PROBLEM_BYTES: usize = 1024;

/// One field and what is wrong with it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// Such as `samples[3].conversation.messages[0].role`.
    pub field: String,
    pub problem: String,
}

/// What is wrong with a request: the first violations, and how many more there are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Violations {
    listed: Vec<Violation>,
    bytes: usize,
    more: usize,
}

impl Violations {
    /// A request with a single problem.
    pub fn one(field: impl Into<String>, problem: impl Into<String>) -> Self {
        let mut violations = Self::default();
        violations.push(field.into(), problem.into());
        violations
    }

    pub(super) fn push(&mut self, field: String, mut problem: String) {
        truncate_at_char(&mut problem, MAX_PROBLEM_BYTES);
        let bytes = self.bytes + field.len() + problem.len();
        if self.listed.len() == MAX_LISTED || bytes > MAX_LISTED_BYTES {
            self.more += 1;
            return;
        }
        self.bytes = bytes;
        self.listed.push(Violation { field, problem });
    }

    pub fn listed(&self) -> &[Violation] {
        &self.listed
    }

    /// Violations that were found but are not listed.
    pub fn more(&self) -> usize {
        self.more
    }

    pub fn is_empty(&self) -> bool {
        self.listed.is_empty() && self.more == 0
    }
}

/// `field: problem` of the first, and how many others there are: what a client shows that does not read details.
impl fmt::Display for Violations {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(first) = self.listed.first() else {
            return f.write_str("invalid request");
        };
        write!(f, "{}: {}", first.field, first.problem)?;
        match self.listed.len() - 1 + self.more {
            0 => Ok(()),
            others => write!(f, " (and {others} more)"),
        }
    }
}

fn truncate_at_char(text: &mut String, limit: usize) {
    if text.len() > limit {
        let end = (0..=limit).rev().find(|&end| text.is_char_boundary(end)).unwrap_or(0);
        text.truncate(end);
        text.push('…');
    }
}

/// Where in a request we are. Only spelled when something is wrong, so that good requests pay nothing for it.
#[derive(Clone, Copy)]
pub(super) struct Path<'a> {
    parent: Option<&'a Path<'a>>,
    name: &'a str,
    index: Option<usize>,
}

impl<'a> Path<'a> {
    pub(super) fn root(name: &'a str) -> Self {
        Self { parent: None, name, index: None }
    }

    pub(super) fn item(name: &'a str, index: usize) -> Self {
        Self { parent: None, name, index: Some(index) }
    }

    pub(super) fn field(&'a self, name: &'a str) -> Path<'a> {
        Path { parent: Some(self), name, index: None }
    }

    pub(super) fn element(&'a self, name: &'a str, index: usize) -> Path<'a> {
        Path { parent: Some(self), name, index: Some(index) }
    }
}

impl fmt::Display for Path<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(parent) = self.parent {
            write!(f, "{parent}.")?;
        }
        f.write_str(self.name)?;
        self.index.map_or(Ok(()), |index| write!(f, "[{index}]"))
    }
}
