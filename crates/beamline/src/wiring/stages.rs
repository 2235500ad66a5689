//! The running parts of the process, in stages that drain one after another.

use anyhow::{Result, anyhow};
use std::future::Future;
use std::time::Duration;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

/// The stages in the order in which data flows through them, which is the order of the drain.
pub struct Stages {
    /// The gateway, which accepts work.
    pub intake: Stage,
    /// Router and worker.
    pub work: Stage,
    /// The web app.
    pub pages: Stage,
    /// The cluster node and the HTTP port.
    pub nodes: Stage,
    /// Metrics and health, which report until the end.
    pub operations: Stage,
}

impl Stages {
    pub fn new() -> Self {
        Self {
            intake: Stage::new("intake"),
            work: Stage::new("work"),
            pages: Stage::new("pages"),
            nodes: Stage::new("nodes"),
            operations: Stage::new("operations"),
        }
    }

    /// Waits until a part ends unexpectedly, which is always an error.
    pub async fn first_end(&mut self) -> Result<()> {
        tokio::select! {
            ended = self.intake.first_end() => ended,
            ended = self.work.first_end() => ended,
            ended = self.pages.first_end() => ended,
            ended = self.nodes.first_end() => ended,
            ended = self.operations.first_end() => ended,
        }
    }

    /// Drains the stages one after another, each within `deadline`. Returns whether all of them ended in time.
    pub async fn drain(self, deadline: Duration) -> bool {
        let mut in_time = true;
        for stage in [self.intake, self.work, self.pages, self.nodes, self.operations] {
            in_time &= stage.drain(deadline).await;
        }
        in_time
    }
}

/// Parts that drain together.
pub struct Stage {
    name: &'static str,
    cancel: CancellationToken,
    parts: JoinSet<(&'static str, Result<()>)>,
}

impl Stage {
    fn new(name: &'static str) -> Self {
        Self { name, cancel: CancellationToken::new(), parts: JoinSet::new() }
    }

    /// Runs a part. `run` gets the token whose cancellation ends the part.
    pub fn run<F, R>(&mut self, part: &'static str, run: R)
    where
        R: FnOnce(CancellationToken) -> F,
        F: Future<Output = Result<()>> + Send + 'static,
    {
        let run = run(self.cancel.clone());
        self.parts.spawn(async move { (part, run.await) });
    }

    /// Waits for the first part to end; forever if the stage runs no part.
    async fn first_end(&mut self) -> Result<()> {
        match self.parts.join_next().await {
            None => std::future::pending().await,
            Some(Ok((part, Ok(())))) => Err(anyhow!("the {part} ended before the process was told to stop")),
            Some(Ok((part, Err(error)))) => Err(error.context(format!("the {part} failed"))),
            Some(Err(panic)) => Err(anyhow!(panic).context(format!("a part of stage {} panicked", self.name))),
        }
    }

    async fn drain(mut self, deadline: Duration) -> bool {
        self.cancel.cancel();

        let drained = tokio::time::timeout(deadline, async {
            while let Some(ended) = self.parts.join_next().await {
                match ended {
                    Ok((part, Ok(()))) => tracing::debug!(part, "drained"),
                    Ok((part, Err(error))) => tracing::error!(part, "failed while draining: {error:#}"),
                    Err(panic) => tracing::error!(stage = self.name, %panic, "a part panicked while draining"),
                }
            }
        });
        let in_time = drained.await.is_ok();

        if !in_time {
            tracing::error!(stage = self.name, "the stage did not drain within {deadline:?}; its tasks are dropped");
        }
        in_time
    }
}
