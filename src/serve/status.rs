//! Errors as gRPC statuses: the only place where a code is chosen.

use std::time::Duration;

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, FieldViolation, StatusExt};

use super::convert::{Violation, Violations};
use crate::registry::{EngineError, NotHere, ReloadFailure, ReloadRunning};
use crate::scorer::Shed;
use crate::wire;

/// A status's message is cut here: it travels in HTTP/2 trailers.
const MAX_MESSAGE_BYTES: usize = 1024;

/// When a server that stops should be tried again, through whatever balances over its successors.
const NOT_READY_RETRY: Duration = Duration::from_secs(1);

/// The status of an error, with details where a client can use them.
pub fn status(error: EngineError) -> Status {
    let words = error.to_string();
    match error {
        EngineError::Overloaded { retry_after, .. } => retry(Code::ResourceExhausted, words, retry_after),
        EngineError::DeadlineExceeded => deadline_exceeded(),
        EngineError::NotReady(_) => retry(Code::Unavailable, words, NOT_READY_RETRY),
        EngineError::Draining { retry_after } => retry(Code::Unavailable, words, retry_after),
        EngineError::UnknownMember { .. } => Status::not_found(cut(words)),
        EngineError::FingerprintNotServed { .. }
        | EngineError::MembersNotLoaded
        | EngineError::CalibrationMissing
        | EngineError::ScaleMissing { .. } => Status::failed_precondition(cut(words)),
        EngineError::Strict { index, failure } => {
            let problem = format!("{}: {}", failure.kind.name(), failure.message);
            invalid(&Violations::one(format!("sample {index}"), problem))
        }
        EngineError::Invalid { field, problem } => invalid(&Violations::one(field, problem)),
        EngineError::WorkerGone => Status::unavailable("the device worker has stopped"),
        EngineError::Forward(details) => {
            // What went wrong inside is for the operator; the caller can do nothing with it.
            tracing::error!(%details, "a request failed inside");
            Status::internal("scoring failed inside the server; its log has the details")
        }
    }
}

/// A reload that changed nothing, with its reason.
pub(super) fn reload(failure: &ReloadFailure) -> Status {
    Status::failed_precondition(cut(failure.to_string()))
}

/// Another reload is running.
pub(super) fn reload_running(running: ReloadRunning) -> Status {
    Status::aborted(running.to_string())
}

/// There is no generation to activate.
pub(super) fn not_here(not_here: &NotHere) -> Status {
    Status::failed_precondition(cut(not_here.to_string()))
}

/// A request that was not let in.
pub(super) fn shed(shed: Shed) -> Status {
    status(EngineError::from(shed))
}

/// INVALID_ARGUMENT with every listed violation as a detail.
pub(super) fn invalid(violations: &Violations) -> Status {
    let mut fields: Vec<_> =
        violations.listed().iter().map(|Violation { field, problem }| FieldViolation::new(field.clone(), problem.clone())).collect();
    if violations.more() > 0 {
        fields.push(FieldViolation::new("", format!("and {} more", violations.more())));
    }
    Status::with_error_details(Code::InvalidArgument, cut(violations.to_string()), ErrorDetails::with_bad_request(fields))
}

pub(super) fn deadline_exceeded() -> Status {
    Status::deadline_exceeded("the deadline passed before the request was answered")
}

/// A status as an answer on a stream.
pub(super) fn in_stream(status: &Status) -> wire::Error {
    let retry = status.get_details_retry_info().and_then(|info| info.retry_delay).unwrap_or_default();
    let violations = status.get_details_bad_request().map(|details| details.field_violations).unwrap_or_default();
    let violation = |FieldViolation { field, description, .. }| wire::FieldViolation { field, description };
    wire::Error {
        code: status.code().into(),
        message: status.message().to_owned(),
        retry_after_ms: u32::try_from(retry.as_millis()).unwrap_or(u32::MAX),
        violations: violations.into_iter().map(violation).collect(),
    }
}

fn retry(code: Code, words: String, after: Duration) -> Status {
    Status::with_error_details(code, cut(words), ErrorDetails::with_retry_info(Some(after)))
}

fn cut(mut words: String) -> String {
    if words.len() > MAX_MESSAGE_BYTES {
        let end = (0..=MAX_MESSAGE_BYTES).rev().find(|&end| words.is_char_boundary(end)).unwrap_or(0);
        words.truncate(end);
        words.push('…');
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::{Failure, FailureKind, Fingerprint};

    #[test]
    fn every_error_has_its_code() {
        let second = Duration::from_secs(1);
        let failure = Failure::new(FailureKind::TooLong, "9 tokens, at most 8");
        let cases = [
            (EngineError::Overloaded { message: "full".into(), retry_after: second }, Code::ResourceExhausted),
            (EngineError::DeadlineExceeded, Code::DeadlineExceeded),
            (EngineError::NotReady("x".into()), Code::Unavailable),
            (EngineError::Draining { retry_after: second }, Code::Unavailable),
            (EngineError::UnknownMember { name: "x".into(), known: vec![] }, Code::NotFound),
            (EngineError::FingerprintNotServed { asked: "x".into(), live: Fingerprint([0; 32]) }, Code::FailedPrecondition),
            (EngineError::MembersNotLoaded, Code::FailedPrecondition),
            (EngineError::CalibrationMissing, Code::FailedPrecondition),
            (EngineError::ScaleMissing { who: "x".into(), seen: 1 }, Code::FailedPrecondition),
            (EngineError::Strict { index: 3, failure }, Code::InvalidArgument),
            (EngineError::Invalid { field: "f".into(), problem: "p".into() }, Code::InvalidArgument),
            (EngineError::WorkerGone, Code::Unavailable),
            (EngineError::Forward("secret".into()), Code::Internal),
        ];
        for (error, code) in cases {
            assert_eq!(status(error.clone()).code(), code, "{error:?}");
        }
    }

    #[test]
    fn an_overloaded_server_says_when_to_come_back() {
        let status = status(EngineError::Overloaded { message: "full".into(), retry_after: Duration::from_millis(250) });
        assert_eq!(status.get_details_retry_info().and_then(|info| info.retry_delay), Some(Duration::from_millis(250)));
    }

    #[test]
    fn violations_travel_as_details_and_the_first_one_as_words() {
        let status = invalid(&Violations::one("samples[1].text", "wrong"));
        assert_eq!(status.message(), "samples[1].text: wrong");
        let details = status.get_details_bad_request().expect("details");
        assert_eq!(details.field_violations[0].field, "samples[1].text");
    }

    #[test]
    fn a_stream_says_what_a_status_says() {
        let full = in_stream(&status(EngineError::Overloaded { message: "full".into(), retry_after: Duration::from_millis(250) }));
        assert_eq!((full.code, full.message.as_str(), full.retry_after_ms), (8, "full", 250));
        let wrong = in_stream(&invalid(&Violations::one("samples[1].text", "wrong")));
        assert_eq!((wrong.code, wrong.retry_after_ms), (3, 0));
        assert_eq!(wrong.violations, [wire::FieldViolation { field: "samples[1].text".into(), description: "wrong".into() }]);
    }

    #[test]
    fn what_failed_inside_stays_inside() {
        assert!(!status(EngineError::Forward("path /secret".into())).message().contains("secret"));
    }
}
