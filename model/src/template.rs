//! Chat templates: from turns of a conversation to the text that a model continues.

use std::path::Path;

use lengthwise_core::{ChatMessage, Prompt};
use minijinja::{Environment, Error, ErrorKind, context};
use serde_json::Value;

use crate::{ModelError, ModelTokenizer};

/// Vicuna v1.1, as FastChat has it: the system text, then `USER: … ASSISTANT: …</s>` turn by turn.
const VICUNA_V1_1: &str = "A chat between a curious user and an artificial intelligence assistant. The assistant \
gives helpful, detailed, and polite answers to the user's questions.{% for m in messages %}{% if m.role == 'user' %} \
USER: {{ m.content }}{% elif m.role == 'assistant' %} ASSISTANT: {{ m.content }}</s>{% endif %}{% endfor %}\
{% if add_generation_prompt %} ASSISTANT:{% endif %}";

/// A chat template in Hugging Face's Jinja dialect.
#[derive(Debug, Clone)]
pub struct PromptTemplate {
    environment: Environment<'static>,
    bos: String,
    eos: String,
}

impl PromptTemplate {
    /// The template of Vicuna v1.1, for models that bring none.
    ///
    /// # Errors
    /// None in practice.
    pub fn vicuna_v1_1() -> Result<Self, ModelError> {
        Self::from_jinja(VICUNA_V1_1, "<s>", "</s>")
    }

    /// A template's source, and the texts of the special tokens it may use.
    ///
    /// # Errors
    /// The source is not a template.
    pub fn from_jinja(source: &str, bos: &str, eos: &str) -> Result<Self, ModelError> {
        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_unknown_method_callback(string_method);
        environment.add_function("raise_exception", |message: String| -> Result<String, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_template_owned("chat", source.to_owned()).map_err(|err| failed(&err))?;
        Ok(Self { environment, bos: bos.to_owned(), eos: eos.to_owned() })
    }

    /// The template of a model folder: `chat_template.jinja`, `tokenizer_config.json`'s `chat_template`, or Vicuna's.
    ///
    /// # Errors
    /// A malformed file or template.
    pub fn from_folder(folder: &Path) -> Result<Self, ModelError> {
        let path = folder.join("tokenizer_config.json");
        let config = match std::fs::read_to_string(&path) {
            Ok(text) => serde_json::from_str(&text)
                .map_err(|err| ModelError::BadFile { path, reason: format!("malformed ({err})") })?,
            Err(_) => Value::Null,
        };
        let token = |name: &str, default: &str| match &config[name] {
            Value::String(text) => text.clone(),
            // Older files write {"content": "<s>", ...}.
            Value::Object(map) => map.get("content").and_then(Value::as_str).unwrap_or(default).to_owned(),
            _ => default.to_owned(),
        };
        let (bos, eos) = (token("bos_token", "<s>"), token("eos_token", "</s>"));
        let file = std::fs::read_to_string(folder.join("chat_template.jinja")).ok();
        match file.or_else(|| default_template(&config["chat_template"])) {
            Some(source) => Self::from_jinja(&source, &bos, &eos),
            None => Self::from_jinja(VICUNA_V1_1, &bos, &eos),
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

    /// The prompt's tokens, one beginning-of-sequence token in front where the model has that rule.
    ///
    /// # Errors
    /// The template refuses the conversation, or the tokenizer failed.
    pub fn encode(&self, tokenizer: &ModelTokenizer, prompt: &Prompt) -> Result<Vec<u32>, ModelError> {
        self.encode_text(tokenizer, &self.render(&prompt.messages())?)
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
        self.encode_text(tokenizer, &(text + answer))
    }

    fn encode_text(&self, tokenizer: &ModelTokenizer, text: &str) -> Result<Vec<u32>, ModelError> {
        // Some templates write the token themselves; twice would be another prompt.
        let written = !self.bos.is_empty() && text.starts_with(&self.bos);
        tokenizer.encode(text, tokenizer.adds_bos() && !written)
    }
}

/// `chat_template` is a text, or a list of named ones of which `default` is meant.
fn default_template(value: &Value) -> Option<String> {
    match value {
        Value::String(source) => Some(source.clone()),
        Value::Array(named) => {
            let default = named.iter().find(|t| t["name"] == "default").or(named.first())?;
            default["template"].as_str().map(str::to_owned)
        }
        _ => None,
    }
}

fn failed(err: &Error) -> ModelError {
    let line = err.line().map(|l| format!(" (line {l})")).unwrap_or_default();
    ModelError::Template { reason: format!("{}{line}", err.detail().map_or(err.to_string(), str::to_owned)) }
}

/// The Python string methods that chat templates call.
fn string_method(
    _: &minijinja::State,
    value: &minijinja::Value,
    method: &str,
    args: &[minijinja::Value],
) -> Result<minijinja::Value, Error> {
    let unknown = || Error::new(ErrorKind::UnknownMethod, format!("method {method} is not supported"));
    let arg = || args.first().and_then(|a| a.as_str());
    if method == "get" && value.kind() == minijinja::value::ValueKind::Map {
        let found = args.first().map(|key| value.get_item(key)).transpose()?.filter(|v| !v.is_undefined());
        return Ok(found.or_else(|| args.get(1).cloned()).unwrap_or(minijinja::Value::from(())));
    }
    let text = value.as_str().ok_or_else(unknown)?;
    let chars = |c: char| arg().map_or(c.is_whitespace(), |set| set.contains(c));
    Ok(match (method, arg()) {
        ("strip", _) => text.trim_matches(chars).into(),
        ("lstrip", _) => text.trim_start_matches(chars).into(),
        ("rstrip", _) => text.trim_end_matches(chars).into(),
        ("upper", _) => text.to_uppercase().into(),
        ("lower", _) => text.to_lowercase().into(),
        ("startswith", Some(prefix)) => text.starts_with(prefix).into(),
        ("endswith", Some(suffix)) => text.ends_with(suffix).into(),
        ("split", Some(by)) => minijinja::Value::from_iter(text.split(by)),
        ("split", None) => minijinja::Value::from_iter(text.split_whitespace()),
        ("replace", Some(from)) => match args.get(1).and_then(|a| a.as_str()) {
            Some(to) => text.replace(from, to).into(),
            None => return Err(unknown()),
        },
        _ => return Err(unknown()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chat() -> Vec<ChatMessage> {
        vec![ChatMessage::user("Hi"), ChatMessage::assistant("Hello"), ChatMessage::user(" Bye ")]
    }

    #[test]
    fn vicuna_is_written_as_published() -> anyhow::Result<()> {
        let template = PromptTemplate::vicuna_v1_1()?;
        assert_eq!(
            template.render(&[ChatMessage::user("What is the sun?")])?,
            "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, \
             detailed, and polite answers to the user's questions. USER: What is the sun? ASSISTANT:"
        );
        assert!(template.render(&chat())?.ends_with("USER: Hi ASSISTANT: Hello</s> USER:  Bye  ASSISTANT:"));
        Ok(())
    }

    #[test]
    fn a_template_in_the_style_of_llama_3() -> anyhow::Result<()> {
        let source = "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + \
                      '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}{% endfor %}\
                      {% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}";
        let template = PromptTemplate::from_jinja(source, "<|begin_of_text|>", "<|eot_id|>")?;
        let text = template.render(&chat()[2..])?;
        assert_eq!(
            text,
            "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>\
             <|start_header_id|>assistant<|end_header_id|>\n\n"
        );
        Ok(())
    }

    #[test]
    fn a_template_that_refuses_says_why() -> anyhow::Result<()> {
        let source = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('a system turn comes first') }}{% endif %}";
        let err = PromptTemplate::from_jinja(source, "", "")?.render(&chat()).expect_err("refused").to_string();
        assert!(err.contains("a system turn comes first"), "{err}");
        assert!(PromptTemplate::from_jinja("{% if %}", "", "").is_err());
        Ok(())
    }

    #[test]
    fn python_string_methods_work() -> anyhow::Result<()> {
        let source = "{{ messages[2].content.strip().upper() }}|{{ messages[0].content.startswith('H') }}|\
                      {{ messages[0].get('tool', 'none') }}|{{ 'a-b'.split('-')[1] }}";
        assert_eq!(PromptTemplate::from_jinja(source, "", "")?.render(&chat())?, "BYE|True|none|b");
        Ok(())
    }
}
