//! Chat templates: from turns of a conversation to the text that a model continues.

mod python;

use std::path::Path;

use lengthwise_core::{ChatMessage, Prompt};
use minijinja::{Environment, Error, ErrorKind, context};
use serde_json::Value;

use crate::tokenizer::{special_token, tokenizer_config};
use crate::{ModelError, ModelTokenizer};

/// Vicuna v1.1, as FastChat has it: the system text, then `USER: … ASSISTANT: …</s>USER: …` turn by turn, a space after
/// the user's turns and none after the assistant's.
const VICUNA_V1_1: &str = "{% if messages and messages[0].role == 'system' %}{{ messages[0].content }}{% else %}\
A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and \
polite answers to the user's questions.{% endif %}{{ ' ' }}{% for m in messages %}{% if m.role == 'user' %}\
USER: {{ m.content }}{{ ' ' }}{% elif m.role == 'assistant' %}ASSISTANT: {{ m.content }}</s>{% endif %}{% endfor %}\
{% if add_generation_prompt %}ASSISTANT:{% endif %}";

/// A chat template in Hugging Face's Jinja dialect.
#[derive(Debug, Clone)]
pub struct PromptTemplate {
    environment: Environment<'static>,
    bos: String,
    eos: String,
    /// The tokenizer puts its special tokens in front: FastChat, whose template is Vicuna's, lets it. What a model's own
    /// template gives is the whole prompt, as in `apply_chat_template` and the engines that follow it.
    special_tokens: bool,
}

impl PromptTemplate {
    /// The template of Vicuna v1.1, for models that bring none.
    ///
    /// # Errors
    /// None in practice.
    pub fn vicuna_v1_1() -> Result<Self, ModelError> {
        Self::vicuna("<s>", "</s>")
    }

    fn vicuna(bos: &str, eos: &str) -> Result<Self, ModelError> {
        Ok(Self {
            special_tokens: true,
            ..Self::from_jinja(VICUNA_V1_1, bos, eos)?
        })
    }

    /// A template's source, and the texts of the special tokens it may use.
    ///
    /// # Errors
    /// The source is not a template.
    pub fn from_jinja(source: &str, bos: &str, eos: &str) -> Result<Self, ModelError> {
        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_unknown_method_callback(python::method);
        environment.add_filter("tojson", python::to_json);
        environment.add_function("raise_exception", |message: String| -> Result<String, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message))
        });
        // strftime_now is left undefined on purpose: templates then write a fixed date, and a prompt stays the same.
        let source = python::without_generation_marks(source);
        environment
            .add_template_owned("chat", source)
            .map_err(|err| failed(&err))?;
        Ok(Self {
            environment,
            bos: bos.to_owned(),
            eos: eos.to_owned(),
            special_tokens: false,
        })
    }

    /// The template of a model folder: `chat_template.jinja`, `tokenizer_config.json`'s `chat_template`, or Vicuna's.
    ///
    /// # Errors
    /// A malformed file or template.
    pub fn from_folder(folder: &Path) -> Result<Self, ModelError> {
        let settings = tokenizer_config(folder)?;
        match std::fs::read_to_string(folder.join("chat_template.jinja")) {
            Ok(source) => Self::of(&settings, Some(&source)),
            Err(_) => Self::of(&settings, None),
        }
    }

    /// The template of the text of a `tokenizer_config.json`, or Vicuna's where it has none.
    ///
    /// # Errors
    /// It is malformed, or its template is.
    pub fn from_tokenizer_config(text: &str) -> Result<Self, ModelError> {
        let malformed = |err: serde_json::Error| ModelError::BadFile {
            path: "tokenizer_config.json".into(),
            reason: format!("malformed ({err})"),
        };
        Self::of(&serde_json::from_str(text).map_err(malformed)?, None)
    }

    fn of(settings: &Value, source: Option<&str>) -> Result<Self, ModelError> {
        let token = |name: &str, default: &str| special_token(settings, name).unwrap_or_else(|| default.to_owned());
        let (bos, eos) = (token("bos_token", "<s>"), token("eos_token", "</s>"));
        match source.or_else(|| default_template(&settings["chat_template"])) {
            Some(source) => Self::from_jinja(source, &bos, &eos),
            None => Self::vicuna(&bos, &eos),
        }
    }

    /// The conversation as text, ending where the assistant's next turn begins.
    ///
    /// # Errors
    /// The template refuses the conversation.
    pub fn render(&self, messages: &[ChatMessage]) -> Result<String, ModelError> {
        let template = self.environment.get_template("chat").map_err(|err| failed(&err))?;
        let context = context! {
            messages => messages,
            add_generation_prompt => true,
            bos_token => self.bos,
            eos_token => self.eos,
        };
        template.render(context).map_err(|err| failed(&err))
    }

    /// The prompt's tokens. A beginning-of-sequence token is in front where the model's own template writes it, or, with
    /// Vicuna's, where the tokenizer has that rule.
    ///
    /// # Errors
    /// The template refuses the conversation, or the tokenizer failed.
    pub fn encode(&self, tokenizer: &ModelTokenizer, prompt: &Prompt) -> Result<Vec<u32>, ModelError> {
        tokenizer.encode(&self.render(&prompt.messages())?, self.special_tokens)
    }

    /// The tokens of the prompt with the assistant's answer behind it, without the token that ends it. A space stands
    /// between the two where the template's text does not end in white space (Vicuna's does not).
    ///
    /// # Errors
    /// The template refuses the conversation, or the tokenizer failed.
    pub fn encode_with_answer(
        &self,
        tokenizer: &ModelTokenizer,
        prompt: &Prompt,
        answer: &str,
    ) -> Result<Vec<u32>, ModelError> {
        let mut text = self.render(&prompt.messages())?;
        if !text.ends_with(char::is_whitespace) {
            text.push(' ');
        }
        tokenizer.encode(&(text + answer), self.special_tokens)
    }
}

/// `chat_template` is a text, or a list of named ones of which `default` is meant.
fn default_template(value: &Value) -> Option<&str> {
    match value {
        Value::String(source) => Some(source),
        Value::Array(named) => {
            let default = named.iter().find(|t| t["name"] == "default").or(named.first())?;
            default["template"].as_str()
        }
        _ => None,
    }
}

fn failed(err: &Error) -> ModelError {
    let line = err.line().map(|l| format!(" (line {l})")).unwrap_or_default();
    ModelError::Template {
        reason: format!("{}{line}", err.detail().map_or(err.to_string(), str::to_owned)),
    }
}

#[cfg(test)]
mod tests;
