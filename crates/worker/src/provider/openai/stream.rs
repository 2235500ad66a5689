//! An answer that arrives as an event stream: its pieces are relayed as they arrive.

use super::answer::{Added, Answer, Received};
use super::{FirstToken, Outcome, Output};
use futures_util::StreamExt;
use reqwest::Response;

/// A line of the event stream, in bytes.
const LINE_MAX: usize = 256 * 1024;

/// Relays an event stream to `output` as it arrives; with `in_full`, also the pieces that are more than text. Returns
/// the whole answer.
pub async fn relay(
    response: Response,
    output: &Output,
    first_token: &FirstToken,
    in_full: bool,
) -> Result<Answer, Outcome> {
    let mut relay = Relay { answer: Answer::default(), output, in_full, has_begun: false };
    let mut buffer: Vec<u8> = Vec::new();
    let mut pieces = response.bytes_stream();
    loop {
        let piece = if relay.has_begun {
            pieces.next().await
        } else {
            first_token.for_it(pieces.next()).await?
        };
        let Some(piece) = piece else { break };
        let piece = piece.map_err(|e| Outcome::failed("broken_stream", format!("the answer broke off: {e}")))?;
        // What is left over has no line end.
        let searched = buffer.len();
        buffer.extend_from_slice(&piece);

        let (mut start, mut search) = (0, searched);
        while let Some(end) = buffer[search..].iter().position(|byte| *byte == b'\n') {
            let end = search + end;
            if relay.take(&buffer[start..end]).await? {
                return Ok(relay.answer);
            }
            (start, search) = (end + 1, end + 1);
        }
        buffer.drain(..start);
        if buffer.len() > LINE_MAX {
            let text = format!("a line of the answer is longer than {LINE_MAX} bytes");
            return Err(Outcome::failed("broken_stream", text));
        }
    }

    // Some endpoints send a finish reason and close the stream without [DONE].
    if relay.answer.has_finished() {
        Ok(relay.answer)
    } else {
        Err(Outcome::failed("broken_stream", "the answer ended without [DONE]"))
    }
}

struct Relay<'a> {
    answer: Answer,
    output: &'a Output,
    in_full: bool,
    /// The first token has arrived.
    has_begun: bool,
}

impl Relay<'_> {
    /// Takes one line of the event stream; returns whether it was the last.
    async fn take(&mut self, line: &[u8]) -> Result<bool, Outcome> {
        let Some(data) = line.trim_ascii().strip_prefix(b"data:").map(<[u8]>::trim_ascii) else {
            return Ok(false);
        };
        if data == b"[DONE]" {
            return Ok(true);
        }
        let received = match serde_json::from_slice::<Received<'_>>(data) {
            Ok(received) => received,
            // JSON of another form: endpoints send events of their own, too.
            Err(error) if error.is_data() && std::str::from_utf8(data).is_ok() => return Ok(false),
            Err(_) => return Err(Outcome::failed("broken_stream", "a piece of the answer is not JSON")),
        };
        if let Some(error) = received.error() {
            return Err(Outcome::failed("refused", error));
        }

        match self.answer.take(received)? {
            Added::Text(text) => {
                self.has_begun |= !text.is_empty();
                self.output.push(&text).await;
            }
            Added::More { text, delta } => {
                self.has_begun = true;
                if self.in_full {
                    self.output.push_delta(&text, &delta).await;
                } else {
                    self.output.push(&text).await;
                }
            }
            Added::Nothing => {}
        }
        Ok(false)
    }
}
