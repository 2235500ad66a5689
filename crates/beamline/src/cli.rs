//! The command line, as clap parses it.

use crate::config::Layers;
use clap::{Args, Parser, Subcommand, ValueEnum};
use std::path::PathBuf;

#[derive(Debug, Parser)]
#[command(name = "beamline", version, about, max_term_width = 110)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the parts (all of them, unless --roles selects some)
    Up(Setting),
    /// Submit a task to the gateway and print the answer
    Submit(Submit),
    /// Check that the gateway answers
    Ping(Socket),
    /// Print a connection token for the real-time endpoint
    Token(Token),
    /// Print the key of the server API and of decisions over HTTP
    ApiKey(DataDir),
    /// Print a token for an operator of the routers
    OperatorToken(OperatorToken),
    /// Manage the accounts that may sign in
    #[command(subcommand)]
    User(User),
    /// Check the policies, or delete one
    #[command(subcommand)]
    Policy(Policy),
    /// Load a running part for a long time, and check it for lost requests and growth
    #[command(subcommand)]
    Soak(Soak),
    /// Show or check the settings
    #[command(subcommand)]
    Config(Config),
}

/// Settings that have a flag; the file and the environment set the others.
#[derive(Debug, Args, Default)]
pub struct Setting {
    /// Settings file [default: beamline.toml, if it exists]
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Directory for everything that Beamline stores on this machine
    #[arg(long, value_name = "DIR")]
    pub data_dir: Option<String>,
    /// Address of pages, WebSocket and API; port 0 picks a free one
    #[arg(long, value_name = "ADDR")]
    pub http: Option<String>,
    /// Address of metrics and health
    #[arg(long, value_name = "ADDR")]
    pub ops: Option<String>,
    /// Address of gRPC
    #[arg(long, value_name = "ADDR")]
    pub grpc: Option<String>,
    /// Path of the gateway's Unix socket
    #[arg(long, value_name = "PATH")]
    pub socket: Option<String>,
    /// Parts to run: gateway,router,worker,cluster,webapp
    #[arg(long, value_name = "LIST")]
    pub roles: Option<String>,
    /// NATS server to use instead of the embedded bus
    #[arg(long, value_name = "URL")]
    pub nats_url: Option<String>,
    /// Redis to use instead of the memory engine
    #[arg(long, value_name = "URL")]
    pub redis_url: Option<String>,
    /// Database to use instead of the embedded SQLite
    #[arg(long, value_name = "URL")]
    pub database_url: Option<String>,
    /// Format of the log lines: human or json
    #[arg(long, value_name = "FORMAT")]
    pub log_format: Option<String>,
}

impl Setting {
    pub fn into_layers(self) -> Layers {
        let mut layers = Layers::from_process();
        layers.file = self.config;
        let flags = [
            ("data_dir", self.data_dir),
            ("http.listen", self.http),
            ("ops.listen", self.ops),
            ("grpc.listen", self.grpc),
            ("gateway.socket", self.socket),
            ("roles", self.roles),
            ("nats.url", self.nats_url),
            ("redis.urls", self.redis_url),
            ("database.url", self.database_url),
            ("log.format", self.log_format),
        ];
        layers.flags = flags
            .into_iter()
            .filter_map(|(name, value)| Some((name, value?)))
            .collect();
        layers
    }
}

#[derive(Debug, Args)]
pub struct Socket {
    /// Path of the gateway's Unix socket [default: from the settings]
    #[arg(long, value_name = "PATH")]
    pub socket: Option<String>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum Wait {
    /// The decision: the selected provider
    Decision,
    /// The result of the task
    Result,
    /// The output as it is produced, then the result
    Stream,
}

#[derive(Debug, Args)]
pub struct Submit {
    /// Task type, by which policies select a provider
    #[arg(long = "type", value_name = "TYPE")]
    pub task_type: String,
    /// What to wait for
    #[arg(long, value_enum, default_value = "decision")]
    pub wait: Wait,
    /// Give up after this long, for example 30s
    #[arg(long, value_name = "DURATION")]
    pub timeout: Option<String>,
    /// Tenant to act for
    #[arg(long, value_name = "NAME")]
    pub tenant: Option<String>,
    /// The task's parameters, a JSON object; `-` reads them from standard input
    #[arg(value_name = "JSON|-")]
    pub params: String,
    #[command(flatten)]
    pub socket: Socket,
}

#[derive(Debug, Args)]
pub struct DataDir {
    /// Directory for everything that Beamline stores on this machine [default: from the settings]
    #[arg(long, value_name = "DIR")]
    pub data_dir: Option<String>,
}

#[derive(Debug, Args)]
pub struct Token {
    #[command(flatten)]
    pub data_dir: DataDir,
    /// User that the token names
    #[arg(long, value_name = "NAME")]
    pub user: String,
    /// Lifetime of the token
    #[arg(long, value_name = "DURATION", default_value = "15m")]
    pub ttl: String,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum OperatorRole {
    /// See the state of routers, and policies
    Viewer,
    /// Also try out what a request would get
    Operator,
    /// Nothing more yet
    Admin,
}

#[derive(Debug, Args)]
pub struct OperatorToken {
    #[command(flatten)]
    pub data_dir: DataDir,
    /// Operator that the token names, for the log
    #[arg(long, value_name = "NAME")]
    pub name: String,
    /// What the operator may do
    #[arg(long, value_enum, default_value = "viewer")]
    pub role: OperatorRole,
    /// Lifetime of the token
    #[arg(long, value_name = "DURATION", default_value = "1h")]
    pub ttl: String,
}

#[derive(Debug, Subcommand)]
pub enum User {
    /// Create an account; the password is read from standard input
    Add {
        name: String,
        #[command(flatten)]
        data_dir: DataDir,
    },
}

#[derive(Debug, Subcommand)]
pub enum Policy {
    /// Check all policies of a directory; fails if one cannot be used
    Lint {
        /// Policy directory, with <tenant>/<policy>.{json,yaml,toml} [default: from the settings]
        #[arg(value_name = "DIR")]
        dir: Option<PathBuf>,
    },
    /// Delete a policy for good: its file, and the last good version that routers keep
    Delete {
        #[arg(value_name = "TENANT/POLICY")]
        name: String,
        /// Policy directory [default: from the settings]
        #[arg(long, value_name = "DIR")]
        policies: Option<PathBuf>,
        /// Delete the policy even though its file is missing from the directory
        #[arg(long)]
        vanished: bool,
    },
}

#[derive(Debug, Subcommand)]
pub enum Soak {
    /// Send requests, account for every one, and watch the memory and descriptors of the gateway's process
    Gateway(SoakGateway),
}

#[derive(Debug, Args)]
pub struct SoakGateway {
    #[command(flatten)]
    pub socket: Socket,
    /// Duration of the soak, for example 2h
    #[arg(long = "for", value_name = "DURATION", default_value = "2h")]
    pub duration: String,
    /// Number of clients
    #[arg(long, value_name = "N", default_value = "16")]
    pub clients: usize,
    /// Requests that each client keeps in flight
    #[arg(long, value_name = "N", default_value = "4")]
    pub in_flight: usize,
    /// End after this many requests, if --for has not passed before
    #[arg(long, value_name = "N")]
    pub requests: Option<u64>,
    /// Requests per second of all clients together, without bursts [default: as fast as answers arrive]
    #[arg(long, value_name = "N")]
    pub rate: Option<f64>,
    /// Deadline of each request
    #[arg(long, value_name = "DURATION")]
    pub deadline: Option<String>,
    /// Replace the router on this NATS server and answer every request after its deadline; no router may run there
    #[arg(long, value_name = "URL", requires = "deadline")]
    pub late_router: Option<String>,
    /// URL of the gateway's metrics, such as http://127.0.0.1:9090/metrics, to watch its tasks and requests in flight
    /// too
    #[arg(long, value_name = "URL")]
    pub metrics: Option<String>,
    /// Task type, by which policies select a provider
    #[arg(long = "type", value_name = "TYPE", default_value = "echo")]
    pub task_type: String,
    /// Write the evidence to this file as JSON, and update it while the soak runs
    #[arg(long, value_name = "FILE")]
    pub evidence: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
pub enum Config {
    /// Print the effective settings and the source of each
    Show(Setting),
    /// Check the settings without starting anything
    Check(Setting),
}
