//! The headers of v2: an invalid one is refused, and the refusal names it. (In v1 it is counted and ignored.)

use super::unfit;
use bus::Headers;
use wire::id::{self, InvalidId};
use wire::router::{DecideRequest, ErrorBody, IntakeCode, headers as x};

/// Optional headers that name something, and those that count.
const NAMES: [&str; 3] = [x::ASSIGNMENT_ID, x::PRODUCER, x::SCHEMA_ID];
const NUMBERS: [&str; 2] = [x::RETRY_COUNT, x::SENT_AT_MS];

/// Checks the headers and takes the ids from them: they beat the payload's.
pub fn apply(request: &mut DecideRequest, headers: &Headers) -> Result<(), ErrorBody> {
    let version = required(headers, x::CONTRACT_VERSION)?;
    if version != x::CONTRACT_V2 {
        let text = format!("the header {} must be \"{}\" here", x::CONTRACT_VERSION, x::CONTRACT_V2);
        return Err(of_header(ErrorBody::invalid(IntakeCode::VersionUnsupported, text), x::CONTRACT_VERSION));
    }

    let trace_id = required(headers, x::TRACE_ID)?;
    check(x::TRACE_ID, id::check(trace_id))?;
    request.trace_id = Some(trace_id.into());

    let tenant_id = required(headers, x::TENANT_ID)?;
    check(x::TENANT_ID, id::check_tenant(tenant_id))?;
    request.tenant_id = tenant_id.into();

    if let Some(request_id) = headers.get(x::REQUEST_ID) {
        check(x::REQUEST_ID, id::check(request_id))?;
        request.request_id = request_id.into();
    }
    for name in NAMES {
        headers
            .get(name)
            .map_or(Ok(()), |value| check(name, id::check(value)))?;
    }
    for name in NUMBERS {
        if headers.get(name).is_some_and(|value| value.parse::<u64>().is_err()) {
            return Err(of_header(unfit(format!("the header {name} must be a whole number")), name));
        }
    }
    Ok(())
}

fn required<'a>(headers: &'a Headers, name: &'static str) -> Result<&'a str, ErrorBody> {
    let value = headers.get(name).filter(|value| !value.is_empty());
    value.ok_or_else(|| {
        let text = format!("the header {name} is missing; every request of v2 has it");
        of_header(unfit(text), name)
    })
}

fn check(name: &'static str, checked: Result<(), InvalidId>) -> Result<(), ErrorBody> {
    checked.map_err(|error| of_header(unfit(format!("the header {name} {error}")), name))
}

/// Names the header for programs, too.
fn of_header(error: ErrorBody, name: &'static str) -> ErrorBody {
    let details = [("header", name)].into_iter().collect();
    ErrorBody { details: Some(details), ..error }
}
