//! Conditions of rules: CEL expressions, and the legacy JSON form with the same meaning. An undefined variable is false.

use cel::{Context, Program, Value as Cel};
use serde_json::Value;
use std::cell::OnceCell;
use wire::router::DecideRequest;

/// Every operator of a chain is a step down the stack, for the parser and for each decision.
const EXPRESSION_MAX: usize = 2048;

pub enum Condition {
    Cel(Box<Program>),
    Legacy(Legacy),
}

pub enum Legacy {
    /// `{key: [values]}`: each key of the metadata has one of its values.
    OneOf(Vec<(String, Vec<Value>)>),
    /// `{"op": [a, b]}`.
    Compare(Operator, Operand, Operand),
}

#[derive(Clone, Copy)]
pub enum Operator {
    Equal,
    NotEqual,
    Greater,
    Less,
    GreaterOrEqual,
    LessOrEqual,
    In,
}

pub enum Operand {
    Literal(Value),
    /// `{"var": "context.x"}`: a path into the metadata.
    Variable(Vec<String>),
}

/// What conditions see of a request. CEL's own view is built when the first expression asks for it.
pub struct Scope<'a> {
    request: &'a DecideRequest,
    cel: OnceCell<Vec<(&'static str, Cel)>>,
}

impl<'a> Scope<'a> {
    pub fn new(request: &'a DecideRequest) -> Self {
        Self { request, cel: OnceCell::new() }
    }

    fn variables(&self) -> &[(&'static str, Cel)] {
        self.cel.get_or_init(|| {
            let cel = |value: Value| cel::to_value(value).unwrap_or(Cel::Null);
            let task = serde_json::to_value(&self.request.task).unwrap_or_default();
            let metadata =
                self.request.metadata.clone().map_or_else(|| Value::Object(Default::default()), Value::Object);
            let constraints = serde_json::to_value(self.request.constraints.unwrap_or_default()).unwrap_or_default();
            vec![
                ("task", cel(task)),
                ("tenant_id", cel(self.request.tenant_id.clone().into())),
                ("metadata", cel(metadata)),
                ("constraints", cel(constraints)),
            ]
        })
    }

    fn metadata(&self, path: &[String]) -> Option<&Value> {
        let (first, rest) = path.split_first()?;
        rest.iter().try_fold(self.request.metadata.as_ref()?.get(first)?, |value, key| value.get(key))
    }
}

// Building a context with the standard functions costs tens of microseconds: one a thread, an inner scope a condition.
thread_local! {
    static STANDARD: Context<'static, 'static> = Context::default();
}

impl Condition {
    pub fn compile(when: &Value) -> Result<Self, String> {
        match when {
            Value::String(text) if text.len() > EXPRESSION_MAX => {
                Err(format!("has {} bytes; an expression may have {EXPRESSION_MAX}", text.len()))
            }
            Value::String(text) => {
                // The parser gives up on some inputs by panicking; a policy file must not end the router.
                let parsed = std::panic::catch_unwind(|| Program::compile(text));
                let program = parsed.map_err(|_| "cannot be parsed".to_string())?.map_err(|e| e.to_string())?;
                Ok(Self::Cel(Box::new(program)))
            }
            Value::Object(object) => Legacy::compile(object).map(Self::Legacy),
            other => Err(format!("is {other}, neither an expression nor an object")),
        }
    }

    pub fn holds(&self, scope: &Scope<'_>) -> bool {
        match self {
            Self::Legacy(legacy) => legacy.holds(scope),
            Self::Cel(program) => STANDARD.with(|standard| {
                let mut inner = standard.new_inner_scope();
                for (name, value) in scope.variables() {
                    inner.add_variable_from_value(*name, value.clone());
                }
                matches!(program.execute(&inner), Ok(Cel::Bool(true)))
            }),
        }
    }
}

impl Legacy {
    fn compile(object: &serde_json::Map<String, Value>) -> Result<Self, String> {
        if let [(key, Value::Array(operands))] = object.iter().collect::<Vec<_>>()[..]
            && let Some(operator) = Operator::parse(key)
        {
            let [left, right] = operands.as_slice() else {
                return Err(format!("{key} takes two operands, not {}", operands.len()));
            };
            return Ok(Self::Compare(operator, Operand::compile(left), Operand::compile(right)));
        }
        let mut keys = Vec::new();
        for (key, values) in object {
            match values {
                Value::Array(values) if values.iter().all(|v| !v.is_object() && !v.is_array()) && is_name(key) => {
                    keys.push((key.clone(), values.clone()));
                }
                _ => {
                    return Err(format!(
                        "{key:?} is neither an operator (== != > < >= <= in) nor a key with its values"
                    ));
                }
            }
        }
        // A word with numbers would be read as a key: `{"almost": [1, 2]}` is far more likely a mistyped operator.
        if keys.iter().any(|(_, values)| values.len() == 2 && values.iter().all(Value::is_number)) {
            return Err("compares numbers by a key; write {\"in\": [{\"var\": \"context.key\"}, [..]]}".into());
        }
        if keys.is_empty() { Err("is empty".into()) } else { Ok(Self::OneOf(keys)) }
    }

    fn holds(&self, scope: &Scope<'_>) -> bool {
        match self {
            Self::OneOf(keys) => keys.iter().all(|(key, values)| {
                scope.metadata(std::slice::from_ref(key)).is_some_and(|found| values.contains(found))
            }),
            Self::Compare(operator, left, right) => match (left.resolve(scope), right.resolve(scope)) {
                (Some(left), Some(right)) => operator.apply(left, right),
                _ => false,
            },
        }
    }
}

fn is_name(key: &str) -> bool {
    key.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-')
}

impl Operand {
    fn compile(value: &Value) -> Self {
        match value.get("var").and_then(Value::as_str) {
            Some(path) => {
                let path = path.strip_prefix("context.").unwrap_or(path);
                Self::Variable(path.split('.').map(String::from).collect())
            }
            None => Self::Literal(value.clone()),
        }
    }

    fn resolve<'a>(&'a self, scope: &'a Scope<'_>) -> Option<&'a Value> {
        match self {
            Self::Literal(value) => Some(value),
            Self::Variable(path) => scope.metadata(path),
        }
    }
}

impl Operator {
    fn parse(text: &str) -> Option<Self> {
        Some(match text {
            "==" => Self::Equal,
            "!=" => Self::NotEqual,
            ">" => Self::Greater,
            "<" => Self::Less,
            ">=" => Self::GreaterOrEqual,
            "<=" => Self::LessOrEqual,
            "in" => Self::In,
            _ => return None,
        })
    }

    fn apply(self, left: &Value, right: &Value) -> bool {
        let order = || match (left, right) {
            (Value::Number(a), Value::Number(b)) => a.as_f64().partial_cmp(&b.as_f64()),
            (Value::String(a), Value::String(b)) => Some(a.cmp(b)),
            _ => None,
        };
        match self {
            Self::Equal => left == right,
            Self::NotEqual => left != right,
            Self::Greater => order().is_some_and(std::cmp::Ordering::is_gt),
            Self::Less => order().is_some_and(std::cmp::Ordering::is_lt),
            Self::GreaterOrEqual => order().is_some_and(std::cmp::Ordering::is_ge),
            Self::LessOrEqual => order().is_some_and(std::cmp::Ordering::is_le),
            Self::In => right.as_array().is_some_and(|values| values.contains(left)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn holds(when: &str, metadata: Value) -> Option<bool> {
        let request = json!({"version": "1", "request_id": "r", "tenant_id": "t", "metadata": metadata,
            "task": {"type": "t", "payload": {}}});
        let request = serde_json::from_value(request).unwrap();
        Condition::compile(&when.into()).ok().map(|condition| condition.holds(&Scope::new(&request)))
    }

    #[test]
    fn no_request_and_no_expression_ends_the_router() {
        let least = json!({"a": i64::MIN, "b": -1, "s": "é"});
        for when in [
            "metadata.a / metadata.b > 0",
            "metadata.a % metadata.b > 0",
            "-metadata.a > 0",
            "metadata.a - 1 > 0",
            "metadata.a * metadata.b > 0",
            "metadata.a / 0 > 0",
            "[1][5] == 1",
            "[1][metadata.a] == 1",
            "metadata.s[1] == 'x'",
            "duration('1000000000000000000h') > duration('1s')",
            "timestamp('x') > timestamp('y')",
            "metadata.s.matches('(')",
            "int(1e300) > 0",
            "uint(-1) > 0",
        ] {
            assert_eq!(holds(when, least.clone()), Some(false), "{when}");
        }
    }

    #[test]
    fn no_expression_goes_too_deep() {
        for (start, step, end) in [
            ("", "(", ""),
            ("", "!", "true"),
            ("", "-", "1 == 1"),
            ("1", "+1", "==1"),
            ("true", "||true", ""),
            ("true", "?true:true", ""),
            ("metadata", ".a", "==1"),
            ("metadata", "[0]", "==1"),
            ("", "[", ""),
            ("", "{1:", ""),
            ("", "size(", ""),
            ("1", "==1", ""),
            ("1", " in[1]", ""),
        ] {
            let longest = |max: usize| {
                let room = max - start.len() - end.len();
                format!("{start}{}{end}", step.repeat(room / step.len()))
            };
            holds(&longest(EXPRESSION_MAX), json!({"a": {"a": 1}}));
            assert_eq!(holds(&longest(100_000), json!({})), None, "{step}");
        }
    }
}
