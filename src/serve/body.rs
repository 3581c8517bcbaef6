//! What a call's messages take while they come and while they go: a request is charged by what has come of it, and a reply
//! keeps its permit until its caller has read it.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http_body::{Frame, SizeHint};
use tonic::Status;
use tonic::body::Body;

use super::status;
use crate::scorer::Permit;

/// A request body that is charged, frame by frame, for the largest message that has come of it so far, complete or not: as
/// much is kept while it is read. One that finds no room ends in its refusal.
pub(super) struct Charged {
    inner: Body,
    permit: Permit,
    framing: Framing,
}

impl Charged {
    pub fn new(inner: Body, permit: Permit) -> Self {
        Self { inner, permit, framing: Framing::default() }
    }

    fn charge(&mut self, data: &[u8]) -> Result<(), Status> {
        self.permit.grow_bytes(self.framing.read(data)).map_err(status::shed)
    }
}

impl http_body::Body for Charged {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = self.get_mut();
        let Some(frame) = ready!(Pin::new(&mut this.inner).poll_frame(context)) else { return Poll::Ready(None) };
        let frame = frame.and_then(|frame| match frame.data_ref().map(|data| this.charge(data)) {
            Some(Err(refused)) => Err(refused),
            _ => Ok(frame),
        });
        Poll::Ready(Some(frame))
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

/// A reply that keeps its permit until all of it has been taken, or nobody wants it any more.
pub(super) struct Unread {
    inner: Body,
    permit: Option<Permit>,
}

impl Unread {
    pub fn new(inner: Body, permit: Permit) -> Self {
        Self { inner, permit: Some(permit) }
    }
}

impl http_body::Body for Unread {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = self.get_mut();
        let frame = ready!(Pin::new(&mut this.inner).poll_frame(context));
        // The server asks for the trailers when its caller has made room for all before them. The permit is back before the
        // caller knows that the call has ended.
        if frame.as_ref().is_none_or(|frame| frame.as_ref().map_or(true, Frame::is_trailers)) {
            this.permit = None;
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

/// Where a body stands among its messages, each of which begins with a flag and its length in four bytes.
#[derive(Debug, Default)]
struct Framing {
    prefix: [u8; 5],
    /// Of the prefix.
    have: usize,
    /// Bytes of the current message that are still to come.
    left: u64,
    /// Bytes of it that have come.
    seen: u64,
}

impl Framing {
    /// The most that had come of one message, while these bytes came.
    fn read(&mut self, mut data: &[u8]) -> u64 {
        let mut most = 0;
        while !data.is_empty() {
            if self.left == 0 {
                self.prefix[self.have] = data[0];
                (self.have, self.seen, data) = (self.have + 1, 0, &data[1..]);
                if self.have == self.prefix.len() {
                    let [_, length @ ..] = self.prefix;
                    (self.have, self.left) = (0, u64::from(u32::from_be_bytes(length)));
                }
                continue;
            }
            let part = data.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
            data = &data[part..];
            self.left -= part as u64;
            self.seen += part as u64;
            most = most.max(self.seen);
        }
        most
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn however_bytes_are_cut_the_largest_message_is_found(
            lengths in prop::collection::vec(0usize..50, 1..8),
            cuts in prop::collection::vec(1usize..30, 1..60),
        ) {
            let stream: Vec<u8> = lengths.iter().flat_map(|&length| {
                let prefix = std::iter::once(1).chain((length as u32).to_be_bytes());
                prefix.chain(std::iter::repeat_n(7, length)).collect::<Vec<u8>>()
            }).collect();
            let (mut framing, mut rest, mut most) = (Framing::default(), stream.as_slice(), 0);
            for cut in cuts.into_iter().cycle() {
                if rest.is_empty() { break }
                let (part, after) = rest.split_at(cut.min(rest.len()));
                most = most.max(framing.read(part));
                rest = after;
            }
            prop_assert_eq!(most, lengths.into_iter().max().unwrap_or(0) as u64);
        }
    }
}
