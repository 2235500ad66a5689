//! A scriptable endpoint of OpenAI's API, for chat completions and embeddings: it streams words with delays, fails, breaks
//! off or hangs.

use parking_lot::Mutex;
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio_util::sync::{CancellationToken, DropGuard};

const BODY_MAX: usize = 16 * 1024 * 1024;

/// The answer to one request.
#[derive(Debug, Clone)]
pub enum Reply {
    /// Sends these pieces, each after `delay`, as an event stream if the request asks for one.
    Words { words: Vec<String>, delay: Duration },
    /// Sends the text of the last user message back, word by word.
    Echo,
    /// Sends these choices of chunks as an event stream, with a finish reason after them.
    Choices { choices: Vec<Value>, finish_reason: String },
    /// Sends this body.
    Body(Value),
    /// Sends an HTTP error with this message, in OpenAI's format.
    Error { status: u16, message: String },
    /// Refuses with 429 and this `Retry-After`, in seconds.
    Busy { retry_after: u64 },
    /// Streams these words, then an error event.
    ErrorInStream { words: Vec<String>, message: String },
    /// Streams these words, then closes the connection without `[DONE]`.
    Break { words: Vec<String> },
    /// Accepts the request and never answers.
    Hang,
}

impl Reply {
    /// Sends `text` word by word, without delay.
    pub fn text(text: &str) -> Self {
        Self::Words { words: split(text), delay: Duration::ZERO }
    }
}

/// A request as the endpoint received it.
#[derive(Debug, Clone)]
pub struct Request {
    pub path: String,
    pub authorization: Option<String>,
    pub body: Value,
}

/// The endpoint; dropping the handle stops it.
pub struct OpenAi {
    address: SocketAddr,
    state: Arc<State>,
    _end: DropGuard,
}

/// Chooses the answer to a request by its content.
type Choose = Box<dyn Fn(&Request) -> Option<Reply> + Send + Sync>;

#[derive(Default)]
struct State {
    choose: OnceLock<Choose>,
    script: Mutex<VecDeque<Reply>>,
    requests: Mutex<Vec<Request>>,
    open: AtomicUsize,
}

impl OpenAi {
    /// Starts an endpoint that echoes until [`Self::reply`] scripts something else.
    pub async fn start() -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0))
            .await
            .expect("cannot bind a loopback port");
        let address = listener.local_addr().expect("cannot read the listener's address");
        let state = Arc::new(State::default());
        let end = CancellationToken::new();
        tokio::spawn(serve(listener, state.clone(), end.clone()));
        Self { address, state, _end: end.drop_guard() }
    }

    /// The base URL, `http://127.0.0.1:<port>/v1`.
    pub fn url(&self) -> String {
        format!("http://{}/v1", self.address)
    }

    /// Scripts the answer to one request. Scripted answers are queued; when the queue is empty, requests are echoed.
    pub fn reply(&self, reply: Reply) {
        self.state.script.lock().push_back(reply);
    }

    /// Chooses the answers to requests by their content, unless one is scripted. `None` leaves a request to the echo. May be
    /// called once.
    pub fn choose(&self, choose: impl Fn(&Request) -> Option<Reply> + Send + Sync + 'static) {
        assert!(self.state.choose.set(Box::new(choose)).is_ok(), "the answers are chosen already");
    }

    /// Requests whose client is still connected and whose answer has not ended.
    pub fn open(&self) -> usize {
        self.state.open.load(Relaxed)
    }

    /// All requests so far.
    pub fn requests(&self) -> Vec<Request> {
        self.state.requests.lock().clone()
    }
}

async fn serve(listener: TcpListener, state: Arc<State>, end: CancellationToken) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            () = end.cancelled() => return,
            Some(_) = connections.join_next() => {}
            accepted = listener.accept() => {
                if let Ok((stream, _)) = accepted {
                    let state = state.clone();
                    // Ignore IO errors: some tests disconnect in the middle of an answer.
                    connections.spawn(async move {
                        state.open.fetch_add(1, Relaxed);
                        drop(connection(stream, &state).await);
                        state.open.fetch_sub(1, Relaxed);
                    });
                }
            }
        }
    }
}

/// Serves one request and closes the connection.
async fn connection(stream: TcpStream, state: &State) -> io::Result<()> {
    let mut stream = BufReader::new(stream);
    let request = read_request(&mut stream).await?;
    let streamed = request.body["stream"] == json!(true);
    let with_usage = streamed && request.body["stream_options"]["include_usage"] == json!(true);
    let (echo, input) = (last_user_text(&request.body), request.body["input"].clone());
    let path = request.path.clone();
    let scripted = state.script.lock().pop_front();
    let reply = scripted.or_else(|| state.choose.get()?(&request));
    let as_base64 = request.body["encoding_format"] == "base64";
    state.requests.lock().push(request);

    let reply = match reply {
        Some(reply) => reply,
        None if path.ends_with("/chat/completions") => Reply::Echo,
        None if path.ends_with("/embeddings") => Reply::Body(embeddings(&input, as_base64)),
        None => Reply::Error { status: 404, message: "unknown path".into() },
    };
    match reply {
        Reply::Echo => words(&mut stream, streamed, with_usage, &split(&echo), Duration::ZERO).await,
        Reply::Words { words: list, delay } => words(&mut stream, streamed, with_usage, &list, delay).await,
        Reply::Choices { choices, finish_reason } => {
            begin(&mut stream, &[], Duration::ZERO).await?;
            for choice in &choices {
                event(&mut stream, &json!({"object": "chat.completion.chunk", "choices": [choice]}).to_string())
                    .await?;
            }
            end(&mut stream, &finish_reason, with_usage.then(|| usage(choices.len()))).await
        }
        Reply::Body(body) => whole(&mut stream, "200 OK", &body).await,
        Reply::Busy { retry_after } => {
            let body = json!({"error": {"message": "slow down", "type": "requests", "code": "rate_limit_exceeded"}});
            whole(&mut stream, &format!("429 Busy\r\nretry-after: {retry_after}"), &body).await
        }
        Reply::Error { status, message } => error(&mut stream, status, &message).await,
        Reply::ErrorInStream { words: list, message } => {
            begin(&mut stream, &list, Duration::ZERO).await?;
            event(&mut stream, &json!({"error": {"message": message}}).to_string()).await?;
            stream.write_all(b"0\r\n\r\n").await
        }
        // Returning closes the connection in the middle of the chunked body.
        Reply::Break { words: list } => begin(&mut stream, &list, Duration::ZERO).await,
        // Until the client gives up.
        Reply::Hang => stream.read(&mut [0]).await.map(drop),
    }
}

/// The token usage of an answer of so many words.
fn usage(words: usize) -> Value {
    json!({"prompt_tokens": 10, "completion_tokens": words, "total_tokens": 10 + words})
}

/// Embeddings of one text or of a list, in OpenAI's form.
fn embeddings(input: &Value, as_base64: bool) -> Value {
    let count = input.as_array().map_or(1, Vec::len);
    // The same three numbers of 32 bits.
    let embedding = if as_base64 {
        json!("AAAAAAAAAD8AAIC/")
    } else {
        json!([0.0, 0.5, -1.0])
    };
    let data: Vec<_> = (0..count)
        .map(|index| json!({"object": "embedding", "index": index, "embedding": embedding}))
        .collect();
    json!({"object": "list", "data": data, "model": "embedder", "usage": {"prompt_tokens": 2, "total_tokens": 2}})
}

async fn read_request(stream: &mut BufReader<TcpStream>) -> io::Result<Request> {
    let mut line = String::new();
    stream.read_line(&mut line).await?;
    let path = line.split(' ').nth(1).unwrap_or_default().to_string();

    let (mut length, mut authorization) = (0, None);
    loop {
        line.clear();
        stream.read_line(&mut line).await?;
        let Some((name, value)) = line.trim_end().split_once(':') else {
            break;
        };
        match name.to_ascii_lowercase().as_str() {
            "content-length" => length = value.trim().parse().unwrap_or(0),
            "authorization" => authorization = Some(value.trim().to_string()),
            _ => {}
        }
    }

    if length > BODY_MAX {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut body = vec![0; length];
    stream.read_exact(&mut body).await?;
    Ok(Request {
        path,
        authorization,
        body: serde_json::from_slice(&body).unwrap_or_default(),
    })
}

async fn words(
    stream: &mut BufReader<TcpStream>,
    streamed: bool,
    with_usage: bool,
    words: &[String],
    delay: Duration,
) -> io::Result<()> {
    if !streamed {
        let message = json!({"role": "assistant", "content": words.concat()});
        let choices = json!([{"index": 0, "message": message, "finish_reason": "stop"}]);
        let body = json!({"object": "chat.completion", "choices": choices, "usage": usage(words.len())});
        return whole(stream, "200 OK", &body).await;
    }

    begin(stream, words, delay).await?;
    end(stream, "stop", with_usage.then(|| usage(words.len()))).await
}

/// Sends the finish reason, the usage and the end of an event stream.
async fn end(stream: &mut BufReader<TcpStream>, finish_reason: &str, usage: Option<Value>) -> io::Result<()> {
    let last = json!({"choices": [{"index": 0, "delta": {}, "finish_reason": finish_reason}]});
    event(stream, &last.to_string()).await?;
    if let Some(usage) = usage {
        event(stream, &json!({"choices": [], "usage": usage}).to_string()).await?;
    }
    event(stream, "[DONE]").await?;
    stream.write_all(b"0\r\n\r\n").await
}

/// Sends the head of an event stream and these words.
async fn begin(stream: &mut BufReader<TcpStream>, words: &[String], delay: Duration) -> io::Result<()> {
    let head =
        "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\nconnection: close\r\n\r\n";
    stream.write_all(head.as_bytes()).await?;
    for word in words {
        tokio::time::sleep(delay).await;
        let delta = json!({"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": {"content": word}}]});
        event(stream, &delta.to_string()).await?;
    }
    stream.flush().await
}

/// Sends one event as one chunk of the body.
async fn event(stream: &mut BufReader<TcpStream>, data: &str) -> io::Result<()> {
    let event = format!("data: {data}\n\n");
    stream
        .write_all(format!("{:x}\r\n{event}\r\n", event.len()).as_bytes())
        .await?;
    stream.flush().await
}

async fn error(stream: &mut BufReader<TcpStream>, status: u16, message: &str) -> io::Result<()> {
    let body = json!({"error": {"message": message, "type": "error", "code": status}});
    whole(stream, &format!("{status} Error"), &body).await
}

async fn whole(stream: &mut BufReader<TcpStream>, status: &str, body: &Value) -> io::Result<()> {
    let body = body.to_string();
    let head = format!(
        "HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).await?;
    stream.write_all(body.as_bytes()).await?;
    stream.flush().await
}

fn last_user_text(body: &Value) -> String {
    let messages = body["messages"].as_array().map(Vec::as_slice).unwrap_or_default();
    let last = messages.iter().rev().find(|message| message["role"] == "user");
    last.and_then(|message| message["content"].as_str())
        .unwrap_or_default()
        .into()
}

fn split(text: &str) -> Vec<String> {
    text.split_inclusive(' ').map(String::from).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn post(endpoint: &OpenAi, body: &str) -> String {
        let mut stream = TcpStream::connect(endpoint.address).await.unwrap();
        let head = format!(
            "POST /v1/chat/completions HTTP/1.1\r\nAuthorization: Bearer k\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        stream.write_all((head + body).as_bytes()).await.unwrap();
        let mut answer = String::new();
        let _ = stream.read_to_string(&mut answer).await;
        answer
    }

    #[tokio::test]
    async fn answers_as_scripted_then_echoes() {
        let endpoint = OpenAi::start().await;
        endpoint.reply(Reply::text("one two"));
        endpoint.reply(Reply::Error { status: 429, message: "slow down".into() });
        endpoint.reply(Reply::Break { words: vec!["half".into()] });
        let ask = r#"{"stream":true,"messages":[{"role":"user","content":"say hello"}]}"#;

        let streamed = post(&endpoint, ask).await;
        assert!(
            streamed.contains(r#""content":"one ""#) && streamed.ends_with("data: [DONE]\n\n\r\n0\r\n\r\n"),
            "{streamed}"
        );
        assert!(post(&endpoint, ask).await.starts_with("HTTP/1.1 429"));
        let broken = post(&endpoint, ask).await;
        assert!(broken.contains("half") && !broken.contains("[DONE]"));
        assert!(
            post(&endpoint, &ask.replace("true", "false"))
                .await
                .contains(r#""content":"say hello""#)
        );
        assert_eq!(endpoint.requests().len(), 4);
        assert_eq!(endpoint.requests()[0].authorization.as_deref(), Some("Bearer k"));
    }
}
