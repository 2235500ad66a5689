//! Reads the gateway's own figures from its `/metrics`.

use super::Error;
use serde::Serialize;
use std::time::Duration;

const TIMEOUT: Duration = Duration::from_secs(5);

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Figures {
    /// Tasks alive in the process's async runtime.
    pub tasks: u64,
    pub in_flight: u64,
    /// Counted since the process started.
    pub late_replies: u64,
}

pub struct Source {
    http: reqwest::Client,
    url: String,
}

impl Source {
    pub fn new(url: &str) -> Result<Self, Error> {
        let http = reqwest::Client::builder().no_proxy().timeout(TIMEOUT).build();
        let failed = |problem: reqwest::Error| Error::Metrics { url: url.into(), problem: problem.to_string() };
        Ok(Self { http: http.map_err(failed)?, url: url.into() })
    }

    pub async fn read(&self) -> Result<Figures, Error> {
        let failed = |problem: String| Error::Metrics { url: self.url.clone(), problem };
        let answer = self
            .http
            .get(&self.url)
            .send()
            .await
            .and_then(reqwest::Response::error_for_status);
        let text = answer
            .map_err(|e| failed(e.to_string()))?
            .text()
            .await
            .map_err(|e| failed(e.to_string()))?;
        parse(&text).ok_or_else(|| failed("the response lacks the gateway's metrics".into()))
    }
}

fn parse(text: &str) -> Option<Figures> {
    let figure = |name: &str| {
        let value = text
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))?;
        Some(value.trim().parse::<f64>().ok()? as u64)
    };
    Some(Figures {
        tasks: figure("beamline_runtime_tasks")?,
        in_flight: figure("beamline_gateway_in_flight")?,
        late_replies: figure("beamline_bus_late_replies_total")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_its_metrics_among_others() {
        let text = "# TYPE beamline_runtime_tasks gauge\nbeamline_runtime_tasks 12\nbeamline_gateway_in_flight_max 9\n\
                    beamline_gateway_in_flight 3\nbeamline_bus_late_replies_total 1000000\n";
        assert_eq!(parse(text), Some(Figures { tasks: 12, in_flight: 3, late_replies: 1_000_000 }));
        assert_eq!(parse("beamline_gateway_in_flight 3\n"), None);
    }
}
