//! Evaluates CEL expressions over a request and counts the steps: an evaluation that needs more steps than it may take
//! ends with [`Stop::Spent`].
//!
//! The crate `cel` parses, and computes arithmetic and functions of single values. Everything that can take long
//! (loops, searching and comparing lists and texts, patterns) is done here, on the request's own JSON, so values are
//! copied only when they are needed.

use super::meter::{Meter, Stop};
use super::pattern::Pattern;
use cel::common::ast::operators as op;
use cel::common::ast::{
    CallExpr, ComprehensionExpr, EntryExpr, Expr, IdedExpr, ListExpr, LiteralValue, MapExpr, SelectExpr,
};
use cel::objects::{Key, KeyRef};
use cel::{Context, ExecutionError, Value as Cel};
use serde_json::{Map, Number, Value as Json};
use std::cmp::Ordering;
use std::collections::HashMap;
use std::sync::Arc;

/// Steps charged for calling a function of the crate: about the time that it takes.
const FUNCTION_STEPS: u64 = 20;
/// Steps charged for copying a text and for inserting an entry into a map.
const COPY_STEPS: u64 = 8;
const ENTRY_STEPS: u64 = 40;

fn failed<T>(what: impl Into<String>) -> Result<T, Stop> {
    Err(Stop::Failed(what.into()))
}

/// A value of an expression. Values of the request are borrowed.
#[derive(Clone)]
pub enum Val<'a> {
    Text(&'a str),
    List(&'a [Json]),
    Object(&'a Map<String, Json>),
    /// A variable that is not JSON by itself.
    Fields(Arc<[(&'static str, Val<'a>)]>),
    /// A computed value, or one of fixed size.
    Made(Cel),
}

impl<'a> Val<'a> {
    pub fn of(json: &'a Json) -> Self {
        match json {
            Json::Null => Self::Made(Cel::Null),
            Json::Bool(truth) => Self::Made(Cel::Bool(*truth)),
            Json::Number(number) => Self::Made(of_number(number)),
            Json::String(text) => Self::Text(text),
            Json::Array(items) => Self::List(items),
            Json::Object(fields) => Self::Object(fields),
        }
    }

    fn text(&self) -> Option<&str> {
        match self {
            Self::Text(text) => Some(text),
            Self::Made(Cel::String(text)) => Some(text),
            _ => None,
        }
    }

    fn type_name(&self) -> String {
        match self {
            Self::Text(_) => "string".into(),
            Self::List(_) => "list".into(),
            Self::Object(_) | Self::Fields(_) => "map".into(),
            Self::Made(value) => value.type_of().to_string(),
        }
    }

    fn is(&self, truth: bool) -> bool {
        matches!(self, Self::Made(Cel::Bool(it)) if *it == truth)
    }
}

/// Integers are `int`, like literals, so that `metadata.tokens / 1000` divides integers. Only a number that `int`
/// cannot hold is a `uint`.
fn of_number(number: &Number) -> Cel {
    match (number.as_i64(), number.as_u64()) {
        (Some(int), _) => Cel::Int(int),
        (None, Some(uint)) => Cel::UInt(uint),
        (None, None) => Cel::Float(number.as_f64().unwrap_or(f64::NAN)),
    }
}

fn of_literal(literal: &LiteralValue) -> Evaluated<'_> {
    match literal {
        LiteralValue::String(text) => Ok(Val::Text(text.inner())),
        other => Cel::try_from(other.to_val().as_ref()).map(Val::Made).map_err(of_crate),
    }
}

fn truth<'a>(truth: bool) -> Val<'a> {
    Val::Made(Cel::Bool(truth))
}

type Evaluated<'a> = Result<Val<'a>, Stop>;

pub struct Evaluation<'a> {
    /// The variables of every condition.
    pub variables: &'a [(&'static str, Val<'a>)],
    /// The expression's compiled patterns.
    pub patterns: &'a HashMap<String, Pattern>,
    /// Variables of the enclosing loops, the innermost last.
    pub loops: Vec<(&'a str, Val<'a>)>,
    pub meter: Meter,
}

impl<'a> Evaluation<'a> {
    // Expressions nest and so do these calls, so everything with large locals is in a function of its own.
    pub fn eval(&mut self, expr: &'a IdedExpr) -> Evaluated<'a> {
        self.meter.charge(1)?;
        match &expr.expr {
            Expr::Literal(literal) => of_literal(literal),
            Expr::Ident(name) => self.variable(name),
            Expr::Select(select) => self.select(select),
            Expr::Call(call) => self.call(call),
            Expr::List(list) => self.list(list),
            Expr::Map(map) => self.map(map),
            Expr::Comprehension(each) => self.each(each),
            Expr::Struct(_) | Expr::Unspecified => failed("conditions cannot create messages"),
        }
    }

    fn list(&mut self, list: &'a ListExpr) -> Evaluated<'a> {
        let items = list
            .elements
            .iter()
            .map(|item| self.made(item))
            .collect::<Result<Vec<_>, _>>()?;
        Ok(Val::Made(Cel::List(items.into())))
    }

    fn map(&mut self, map: &'a MapExpr) -> Evaluated<'a> {
        let mut fields = HashMap::new();
        for entry in &map.entries {
            let EntryExpr::MapEntry(entry) = &entry.expr else {
                return failed("this kind of map entry is not supported");
            };
            let Ok(key) = TryInto::<Key>::try_into(self.made(&entry.key)?) else {
                return failed("a key of a map is neither a string nor a number nor a bool");
            };
            self.meter.charge(ENTRY_STEPS)?;
            fields.insert(key, self.made(&entry.value)?);
        }
        Ok(Val::Made(Cel::Map(cel::objects::Map { map: fields.into() })))
    }

    pub fn truth(&mut self, expr: &'a IdedExpr) -> Result<bool, Stop> {
        match self.eval(expr)? {
            Val::Made(Cel::Bool(truth)) => Ok(truth),
            other => failed(format!("a {} is neither true nor false", other.type_name())),
        }
    }

    /// Evaluates to a value of the crate, copied from the request where necessary.
    fn made(&mut self, expr: &'a IdedExpr) -> Result<Cel, Stop> {
        let value = self.eval(expr)?;
        self.copied(value)
    }

    fn copied(&mut self, value: Val<'a>) -> Result<Cel, Stop> {
        match value {
            // Cheap whatever its size: lists, maps and texts of the crate are counted references.
            Val::Made(value) => self.meter.charge(1).map(|()| value),
            Val::Text(text) => {
                self.meter.charge(COPY_STEPS)?;
                self.meter.text(text)?;
                Ok(text.into())
            }
            Val::List(items) => {
                self.meter.charge(1 + items.len() as u64)?;
                let items = items
                    .iter()
                    .map(|item| self.copied(Val::of(item)))
                    .collect::<Result<Vec<_>, _>>()?;
                Ok(Cel::List(items.into()))
            }
            Val::Object(fields) => self.copied_map(fields.iter().map(|(key, value)| (key.as_str(), Val::of(value)))),
            Val::Fields(fields) => self.copied_map(fields.iter().cloned()),
        }
    }

    fn copied_map<'k>(&mut self, fields: impl Iterator<Item = (&'k str, Val<'a>)>) -> Result<Cel, Stop> {
        let mut map = HashMap::new();
        for (key, value) in fields {
            self.meter.charge(ENTRY_STEPS)?;
            self.meter.text(key)?;
            map.insert(Key::from(key), self.copied(value)?);
        }
        Ok(Cel::Map(cel::objects::Map { map: map.into() }))
    }

    fn variable(&mut self, name: &'a str) -> Evaluated<'a> {
        let of_loop = self.loops.iter().rev().find(|(known, _)| *known == name);
        let found = of_loop.or_else(|| self.variables.iter().find(|(known, _)| *known == name));
        if let Some((_, value)) = found {
            return Ok(value.clone());
        }

        // It may be the name of a type.
        self.meter.charge(FUNCTION_STEPS)?;
        let ident = IdedExpr { id: 0, expr: Expr::Ident(name.into()) };
        STANDARD
            .with(|standard| Cel::resolve(&ident, standard))
            .map(Val::Made)
            .map_err(|_| Stop::Undefined)
    }

    fn select(&mut self, select: &'a SelectExpr) -> Evaluated<'a> {
        let of = self.eval(&select.operand)?;
        let field = field(&of, &select.field);
        match (field, select.test) {
            (Err(Stop::Undefined), true) => Ok(truth(false)),
            (Ok(_), true) => Ok(truth(true)),
            (field, _) => field,
        }
    }

    fn call(&mut self, call: &'a CallExpr) -> Evaluated<'a> {
        match (call.func_name.as_str(), call.args.as_slice()) {
            (op::CONDITIONAL, [test, then, otherwise]) => {
                let taken = if self.truth(test)? { then } else { otherwise };
                self.eval(taken)
            }
            (op::LOGICAL_AND, [left, right]) => self.logical(left, right, false),
            (op::LOGICAL_OR, [left, right]) => self.logical(left, right, true),
            (op::LOGICAL_NOT, [of]) => self.truth(of).map(|of| truth(!of)),
            (op::NOT_STRICTLY_FALSE, [of]) => self.not_strictly_false(of),
            // A loop's `@result + [item]`. Nothing else can name the result, so it is extended in place.
            (op::ADD, [IdedExpr { expr: Expr::Ident(result), .. }, item]) if result.starts_with('@') => {
                self.append(result, item)
            }
            (name, [left, right]) if call.target.is_none() => self.binary(call, name, left, right),
            _ => self.function(call),
        }
    }

    fn not_strictly_false(&mut self, of: &'a IdedExpr) -> Evaluated<'a> {
        match self.truth(of) {
            Err(Stop::Spent) => Err(Stop::Spent),
            of => Ok(truth(of.unwrap_or(true))),
        }
    }

    fn append(&mut self, result: &str, item: &'a IdedExpr) -> Evaluated<'a> {
        let item = self.made(item)?;
        let place = self.loops.iter_mut().rev().find(|(known, _)| *known == result);
        let taken = place.map(|(_, value)| std::mem::replace(value, Val::Made(Cel::Null)));
        let Some(Val::Made(taken)) = taken else {
            return failed("the loop has no result");
        };
        (taken + item).map(Val::Made).map_err(of_crate)
    }

    fn binary(&mut self, call: &'a CallExpr, name: &str, left: &'a IdedExpr, right: &'a IdedExpr) -> Evaluated<'a> {
        if !matches!(name, op::IN) && !name.starts_with('_') {
            return self.function(call);
        }
        let left = self.eval(left)?;
        let right = self.eval(right)?;
        self.operator(name, left, right)
    }

    fn operator(&mut self, name: &str, left: Val<'a>, right: Val<'a>) -> Evaluated<'a> {
        match name {
            op::EQUALS => self.equal(&left, &right).map(truth),
            op::NOT_EQUALS => self.equal(&left, &right).map(|equal| truth(!equal)),
            op::LESS => self.compare(&left, &right).map(|order| truth(order.is_lt())),
            op::LESS_EQUALS => self.compare(&left, &right).map(|order| truth(order.is_le())),
            op::GREATER => self.compare(&left, &right).map(|order| truth(order.is_gt())),
            op::GREATER_EQUALS => self.compare(&left, &right).map(|order| truth(order.is_ge())),
            op::IN => self.contains(&left, right).map(truth),
            op::INDEX => self.index(&left, right),
            _ => self.arithmetic(name, left, right),
        }
    }

    fn arithmetic(&mut self, name: &str, left: Val<'a>, right: Val<'a>) -> Evaluated<'a> {
        let (left, right) = (self.copied(left)?, self.copied(right)?);
        self.meter.cel(&left)?;
        self.meter.cel(&right)?;
        let done = match name {
            op::ADD => left + right,
            op::SUBSTRACT => left - right,
            op::MULTIPLY => left * right,
            op::DIVIDE => left / right,
            op::MODULO => left % right,
            _ => return failed(format!("there is no operator {name}")),
        };
        done.map(Val::Made).map_err(of_crate)
    }

    /// `&&` and `||`. A side that decides alone does so even if the other side is an error.
    fn logical(&mut self, left: &'a IdedExpr, right: &'a IdedExpr, decides: bool) -> Evaluated<'a> {
        let left = self.truth(left);
        if left == Ok(decides) || left == Err(Stop::Spent) {
            return left.map(truth);
        }

        let both = match (left, self.truth(right)) {
            (Err(error), Ok(right)) if right != decides => Err(error),
            (Err(error), Err(other)) if other != Stop::Spent => Err(error),
            (_, right) => right,
        };
        both.map(truth)
    }

    fn equal(&mut self, left: &Val<'a>, right: &Val<'a>) -> Result<bool, Stop> {
        if let (Some(left), Some(right)) = (left.text(), right.text()) {
            // Texts of different lengths are not compared byte by byte.
            self.meter.text(if left.len() == right.len() { left } else { "" })?;
            return Ok(left == right);
        }
        let (left, right) = (self.copied(left.clone())?, self.copied(right.clone())?);
        self.meter.cel(&left)?;
        Ok(left == right)
    }

    fn compare(&mut self, left: &Val<'a>, right: &Val<'a>) -> Result<Ordering, Stop> {
        let order = match (left, right) {
            (Val::Made(left), Val::Made(right)) => {
                self.meter.cel(left)?;
                left.partial_cmp(right)
            }
            _ => left.text().zip(right.text()).map(|(left, right)| left.cmp(right)),
        };
        if let Some(text) = left.text() {
            self.meter.text(text)?;
        }
        order.map_or_else(|| failed(format!("a {} and a {} have no order", left.type_name(), right.type_name())), Ok)
    }

    fn contains(&mut self, item: &Val<'a>, container: Val<'a>) -> Result<bool, Stop> {
        match &container {
            Val::Object(_) | Val::Fields(_) | Val::Made(Cel::Map(_)) => {
                let found = self.index(&container, item.clone());
                found
                    .map(|_| true)
                    .or_else(|stop| if stop == Stop::Undefined { Ok(false) } else { Err(stop) })
            }
            Val::List(_) | Val::Made(Cel::List(_)) => {
                for other in self.items(container)? {
                    self.meter.charge(1)?;
                    if self.equal(item, &other)? {
                        return Ok(true);
                    }
                }
                Ok(false)
            }
            other => failed(format!("nothing is in a {}", other.type_name())),
        }
    }

    fn index(&mut self, of: &Val<'a>, index: Val<'a>) -> Evaluated<'a> {
        if let Some(name) = index.text() {
            self.meter.text(name)?;
            return field(of, name);
        }
        let Val::Made(index) = index else {
            return failed(format!("a {} is no index", index.type_name()));
        };
        let place = match index {
            Cel::Int(n) => usize::try_from(n).ok(),
            Cel::UInt(n) => usize::try_from(n).ok(),
            _ => None,
        };
        let found = match of {
            Val::List(items) => place.and_then(|n| items.get(n)).map(Val::of),
            Val::Made(Cel::List(items)) => place.and_then(|n| items.get(n)).cloned().map(Val::Made),
            Val::Made(Cel::Map(map)) => match KeyRef::try_from(&index) {
                Ok(key) => map.get(&key).cloned().map(Val::Made),
                Err(_) => None,
            },
            Val::Object(_) | Val::Fields(_) => None,
            other => return failed(format!("a {} has no parts", other.type_name())),
        };
        found.ok_or(Stop::Undefined)
    }

    /// `all`, `exists`, `exists_one`, `map`, `filter`: the parser turns each into a fold.
    fn each(&mut self, each: &'a ComprehensionExpr) -> Evaluated<'a> {
        if each.iter_var2.is_some() {
            return failed("a loop has one variable here");
        }
        let start = self.eval(&each.accu_init)?;
        let range = self.eval(&each.iter_range)?;
        let range = self.items(range)?;

        let place = self.loops.len();
        self.loops.push((&each.accu_var, start));
        self.loops.push((&each.iter_var, Val::Made(Cel::Null)));
        let folded = self.fold(each, range, place);
        self.loops.truncate(place);
        folded
    }

    fn fold(&mut self, each: &'a ComprehensionExpr, range: Items<'a>, place: usize) -> Evaluated<'a> {
        // In `all` and `exists`, a later item may decide the result in spite of an error.
        let decides = match &each.loop_step.expr {
            Expr::Call(call) if call.func_name == op::LOGICAL_AND => Some(false),
            Expr::Call(call) if call.func_name == op::LOGICAL_OR => Some(true),
            _ => None,
        };

        let mut pending = None;
        for item in range {
            if !self.truth(&each.loop_cond)? {
                break;
            }
            self.loops[place + 1].1 = item;
            match self.eval(&each.loop_step) {
                Ok(value) => {
                    if decides.is_some_and(|decides| value.is(decides)) {
                        pending = None;
                    }
                    self.loops[place].1 = value;
                }
                Err(stop) if stop == Stop::Spent || decides.is_none() => return Err(stop),
                Err(stop) => pending = Some(stop),
            }
        }

        match pending {
            Some(stop) => Err(stop),
            None => self.eval(&each.result),
        }
    }

    /// What a loop iterates over: the items of a list, the keys of a map.
    fn items(&mut self, of: Val<'a>) -> Result<Items<'a>, Stop> {
        Ok(match of {
            Val::List(items) => Box::new(items.iter().map(Val::of)),
            Val::Object(fields) => Box::new(fields.keys().map(|key| Val::Text(key))),
            Val::Fields(fields) => Box::new((0..fields.len()).map(move |n| Val::Text(fields[n].0))),
            Val::Made(Cel::List(items)) => Box::new((0..items.len()).map(move |n| Val::Made(items[n].clone()))),
            Val::Made(Cel::Map(map)) => {
                self.meter.charge(map.map.len() as u64)?;
                let keys: Vec<Cel> = map.map.keys().map(Cel::from).collect();
                Box::new(keys.into_iter().map(Val::Made))
            }
            other => return failed(format!("a {} has no items", other.type_name())),
        })
    }

    fn function(&mut self, call: &'a CallExpr) -> Evaluated<'a> {
        let mut args = Vec::with_capacity(call.args.len() + 1);
        for expr in call.target.as_deref().into_iter().chain(&call.args) {
            args.push(self.eval(expr)?);
        }

        match (call.func_name.as_str(), args.as_slice()) {
            ("size", [of]) => {
                let size = match of {
                    Val::List(items) => items.len(),
                    Val::Object(fields) => fields.len(),
                    Val::Made(Cel::List(items)) => items.len(),
                    Val::Made(Cel::Map(map)) => map.map.len(),
                    other => match other.text() {
                        Some(text) => {
                            self.meter.text(text)?;
                            text.chars().count()
                        }
                        None => return self.of_crate(call, args),
                    },
                };
                Ok(Val::Made(Cel::Int(size as i64)))
            }
            ("contains" | "startsWith" | "endsWith", [text, part]) if call.target.is_some() => {
                let (Some(text), Some(part)) = (text.text(), part.text()) else {
                    return self.of_crate(call, args);
                };
                self.meter.text(part)?;
                Ok(truth(match call.func_name.as_str() {
                    "startsWith" => text.starts_with(part),
                    "endsWith" => text.ends_with(part),
                    _ => {
                        self.meter.text(text)?;
                        text.contains(part)
                    }
                }))
            }
            ("matches", [text, pattern]) => {
                let pattern = pattern.text().and_then(|pattern| self.patterns.get(pattern));
                let (Some(text), Some(pattern)) = (text.text(), pattern) else {
                    return failed("matches() takes a string and a pattern");
                };
                Ok(truth(pattern.is_match(text, &mut self.meter)?))
            }
            _ => self.of_crate(call, args),
        }
    }

    /// Calls a function of the crate with copies of its arguments.
    fn of_crate(&mut self, call: &CallExpr, args: Vec<Val<'a>>) -> Evaluated<'a> {
        self.meter.charge(FUNCTION_STEPS)?;
        let args = args
            .into_iter()
            .map(|arg| self.copied(arg))
            .collect::<Result<Vec<_>, _>>()?;
        args.iter().try_for_each(|arg| self.meter.cel(arg))?;
        resolve(&call.func_name, call.target.is_some(), args)
            .map(Val::Made)
            .map_err(of_crate)
    }
}

// Building a context with the standard functions takes tens of microseconds, so each thread keeps one.
thread_local! {
    static STANDARD: Context<'static, 'static> = Context::default();
}

/// Calls a function of the crate.
pub fn resolve(name: &str, is_method: bool, args: Vec<Cel>) -> Result<Cel, ExecutionError> {
    STANDARD.with(|standard| {
        let mut scope = standard.new_inner_scope();
        let mut idents = Vec::with_capacity(args.len());
        for (n, arg) in args.into_iter().enumerate() {
            let ident = format!("@{n}");
            scope.add_variable_from_value(ident.as_str(), arg);
            idents.push(IdedExpr { id: 0, expr: Expr::Ident(ident) });
        }
        let target = (is_method && !idents.is_empty()).then(|| Box::new(idents.remove(0)));
        let call = CallExpr { func_name: name.into(), target, args: idents };
        Cel::resolve(&IdedExpr { id: 0, expr: Expr::Call(call) }, &scope)
    })
}

/// Whether the name is that of a type, such as `int`.
pub fn is_type(name: &str) -> bool {
    let ident = IdedExpr { id: 0, expr: Expr::Ident(name.into()) };
    STANDARD.with(|standard| Cel::resolve(&ident, standard)).is_ok()
}

fn field<'a>(of: &Val<'a>, name: &str) -> Evaluated<'a> {
    let found = match of {
        Val::Object(fields) => fields.get(name).map(Val::of),
        Val::Fields(fields) => fields
            .iter()
            .find(|(known, _)| *known == name)
            .map(|(_, value)| value.clone()),
        Val::Made(Cel::Map(map)) => map.get(&KeyRef::String(name)).cloned().map(Val::Made),
        Val::Made(Cel::Null) => None,
        other => return failed(format!("a {} has no field {name:?}", other.type_name())),
    };
    found.ok_or(Stop::Undefined)
}

type Items<'a> = Box<dyn Iterator<Item = Val<'a>> + 'a>;

/// Rewords an error of the crate: its own text contains values of the request, which must not get into logs.
fn of_crate(error: ExecutionError) -> Stop {
    Stop::Failed(match error {
        ExecutionError::UndeclaredReference(name) => format!("there is no function {name}"),
        ExecutionError::NoSuchOverload(types) => types.to_string(),
        ExecutionError::FunctionError { function, .. } => format!("{function}() cannot take this argument"),
        ExecutionError::UnsupportedBinaryOperator(name, left, right) => {
            format!("cannot {name} a {} and a {}", left.type_of(), right.type_of())
        }
        ExecutionError::Overflow(..) => "a number is too large".into(),
        ExecutionError::DivisionByZero(_) | ExecutionError::RemainderByZero(_) => "a division by zero".into(),
        _ => "the types do not fit".into(),
    })
}
