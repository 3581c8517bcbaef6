//! Requests to a hub, and what its answers mean.

use std::io::Read;
use std::time::Duration;

use ureq::Agent;
use ureq::http::{Response, StatusCode, header};

use super::download::{ATTEMPTS, FIRST_WAIT, LONGEST_WAIT};
use super::listing::RemoteFile;
use super::{Source, Trouble};
use crate::clock::Clock;

/// The files of one folder at one commit.
pub(super) struct HubFiles<'a> {
    pub agent: &'a Agent,
    pub token: Option<&'a str>,
    /// What the address of a file begins with.
    pub folder: String,
}

impl Source for HubFiles<'_> {
    fn open<'s>(&'s self, file: &RemoteFile, begin: u64, end: u64) -> Result<Box<dyn Read + 's>, Trouble> {
        let url = format!("{}{}", self.folder, file.name);
        let mut request = self.agent.get(&url).header(header::RANGE, format!("bytes={begin}-{}", end - 1));
        if let Some(token) = self.token {
            request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
        }
        let response = request.call().map_err(|error| Trouble::passing(error.to_string()))?;
        check_answer(&response, begin, file.bytes, begin == 0 && end == file.bytes)?;
        Ok(Box::new(response.into_body().into_reader()))
    }
}

/// An answer that holds the bytes from `at` on, of a file of this size.
fn check_answer<B>(response: &Response<B>, at: u64, bytes: u64, whole: bool) -> Result<(), Trouble> {
    let text = |name: header::HeaderName| response.headers().get(name).and_then(|value| value.to_str().ok());
    match response.status() {
        StatusCode::PARTIAL_CONTENT => {
            let found = text(header::CONTENT_RANGE).unwrap_or_default();
            let range = found.strip_prefix("bytes ").and_then(|rest| rest.split_once('/'));
            let begin = range.and_then(|(range, _)| range.split_once('-')?.0.parse::<u64>().ok());
            let total = range.and_then(|(_, total)| total.parse::<u64>().ok());
            if begin == Some(at) && total == Some(bytes) {
                Ok(())
            } else {
                Err(Trouble::Final(format!("expected bytes from {at} of {bytes}, found content-range {found:?}")))
            }
        }
        // A server that knows no ranges may still send a small file.
        StatusCode::OK if whole => match text(header::CONTENT_LENGTH).and_then(|length| length.parse::<u64>().ok()) {
            Some(length) if length != bytes => Err(Trouble::Final(format!("expected {bytes} bytes, the server has {length}"))),
            _ => Ok(()),
        },
        StatusCode::OK => Err(Trouble::Final("the server does not answer for a part of a file".to_owned())),
        status => Err(refused(status, text(header::RETRY_AFTER))),
    }
}

/// What a status that is no success means.
fn refused(status: StatusCode, retry_after: Option<&str>) -> Trouble {
    let wait = retry_after.and_then(|seconds| seconds.trim().parse().ok()).map(Duration::from_secs);
    match status.as_u16() {
        401 | 403 => Trouble::Final(format!("{status}: this needs a token that may read it, as HF_TOKEN")),
        404 => {
            Trouble::Final(format!("{status}: there is no such repository, revision or file, or only for those with a token (HF_TOKEN)"))
        }
        408 | 429 | 500..=599 => Trouble::Passing { problem: format!("the server answers {status}"), wait },
        _ => Trouble::Final(format!("the server answers {status}")),
    }
}

/// The body of a small answer, with the same patience.
pub(super) fn get(agent: &Agent, url: &str, token: Option<&str>, clock: &Clock, most: u64) -> Result<Vec<u8>, String> {
    let ask = || -> Result<Vec<u8>, Trouble> {
        let mut request = agent.get(url);
        if let Some(token) = token {
            request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
        }
        let response = request.call().map_err(|error| Trouble::passing(error.to_string()))?;
        if response.status() != StatusCode::OK {
            let wait = response.headers().get(header::RETRY_AFTER).and_then(|value| value.to_str().ok());
            return Err(refused(response.status(), wait));
        }
        let mut body = Vec::new();
        let read = response.into_body().into_reader().take(most + 1).read_to_end(&mut body);
        read.map_err(|error| Trouble::passing(format!("the connection broke: {error}")))?;
        if body.len() as u64 > most { Err(Trouble::Final(format!("the answer has more than {most} bytes"))) } else { Ok(body) }
    };
    let mut failures = 0;
    loop {
        match ask() {
            Ok(body) => return Ok(body),
            Err(Trouble::Final(problem)) => return Err(problem),
            Err(Trouble::Passing { problem, wait }) => {
                failures += 1;
                if failures > ATTEMPTS {
                    return Err(format!("{problem} ({ATTEMPTS} attempts)"));
                }
                clock.pause(wait.unwrap_or(FIRST_WAIT * 2u32.pow(failures - 1)).min(LONGEST_WAIT));
            }
        }
    }
}
