//! The server that a client command uses, and the token it presents.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use kvs_client::{Options, Output, Server};

/// Read timeout; a server sends keep-alives on streams far more often.
pub const READ_TIMEOUT: Duration = Duration::from_secs(60);

#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Server")]
pub struct ServerArgs {
    /// URL of the server
    #[arg(long, env = "KVS_URL", value_name = "URL", default_value = "http://127.0.0.1:8080")]
    url: String,

    #[command(flatten)]
    token: TokenArgs,

    /// Trusted CA certificates, PEM, in place of those of the system
    #[arg(long, env = "KVS_CACERT", value_name = "FILE")]
    cacert: Option<PathBuf>,
}

/// Options of commands that read from a server.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Server")]
pub struct ReadArgs {
    #[command(flatten)]
    server: ServerArgs,

    /// Accept stale reads, which a standby serves
    #[arg(long)]
    stale: bool,
}

#[derive(Debug, Default, clap::Args)]
pub struct TokenArgs {
    /// Bearer token; on the command line it is visible to other users of this machine, unlike in the variable or a file
    #[arg(long, env = "KVS_TOKEN", hide_env_values = true, conflicts_with = "token_file")]
    token: Option<String>,

    /// File with the bearer token
    #[arg(long, env = "KVS_TOKEN_FILE", value_name = "FILE")]
    token_file: Option<PathBuf>,
}

/// Address of the admin listener of a server.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Server")]
pub struct AdminAddress {
    /// Admin listener of the server: an address, or a URL, which can be https://
    #[arg(long, env = "KVS_ADMIN", value_name = "URL", default_value = "127.0.0.1:9090")]
    admin: String,

    /// Trusted CA certificates, PEM, in place of those of the system
    #[arg(long, env = "KVS_CACERT", value_name = "FILE")]
    cacert: Option<PathBuf>,
}

/// The admin listener of a server, for commands that it may ask for a token.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Server")]
pub struct AdminArgs {
    #[command(flatten)]
    address: AdminAddress,

    #[command(flatten)]
    token: TokenArgs,
}

impl AdminAddress {
    pub fn server(&self, token: Option<&str>, read_timeout: Option<Duration>) -> Result<Server> {
        let authorities = self.cacert.as_deref();
        Server::new(&Options { url: &self.admin, flag: "--admin", token, authorities, read_timeout, stale: false })
    }
}

impl AdminArgs {
    pub fn server(&self, read_timeout: Option<Duration>) -> Result<Server> {
        self.address.server(self.token.read()?.as_deref(), read_timeout)
    }
}

/// Format of the output.
#[derive(Debug, clap::Args)]
pub struct OutputArgs {
    /// Format of the output: text, or json with an object per line
    #[arg(long, value_name = "FORMAT", default_value = "text")]
    output: OutputFormat,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum OutputFormat {
    Text,
    Json,
}

impl OutputArgs {
    pub fn output(&self) -> Output {
        match self.output {
            OutputFormat::Text => Output::Text,
            OutputFormat::Json => Output::Json,
        }
    }
}

impl ServerArgs {
    /// Trusted CA certificates.
    pub fn authorities(&self) -> Option<&Path> {
        self.cacert.as_deref()
    }

    pub fn server(&self) -> Result<Server> {
        self.server_within(READ_TIMEOUT)
    }

    /// The server, with another read timeout.
    pub fn server_within(&self, read_timeout: Duration) -> Result<Server> {
        self.server_for(false, read_timeout)
    }

    fn server_for(&self, stale: bool, read_timeout: Duration) -> Result<Server> {
        Server::new(&Options {
            url: &self.url,
            flag: "--url",
            token: self.token.read()?.as_deref(),
            authorities: self.cacert.as_deref(),
            read_timeout: Some(read_timeout),
            stale,
        })
    }
}

impl ReadArgs {
    pub fn server(&self) -> Result<Server> {
        self.server_after(Duration::ZERO)
    }

    /// The server, for a request that it answers only after waiting this long.
    pub fn server_after(&self, wait: Duration) -> Result<Server> {
        self.server.server_for(self.stale, READ_TIMEOUT.saturating_add(wait))
    }
}

impl TokenArgs {
    pub fn read(&self) -> Result<Option<String>> {
        let Some(file) = &self.token_file else { return Ok(self.token.clone()) };
        let text = fs::read_to_string(file).with_context(|| format!("cannot read --token-file {}", file.display()))?;
        Ok(Some(text))
    }
}
