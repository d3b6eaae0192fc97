//! Templates of the models that are run, letter by letter.

use super::*;

fn chat() -> Vec<ChatMessage> {
    vec![
        ChatMessage::user("Hi"),
        ChatMessage::assistant("Hello"),
        ChatMessage::user(" Bye "),
    ]
}

fn system(content: &str) -> ChatMessage {
    ChatMessage {
        role: "system".to_owned(),
        content: content.to_owned(),
    }
}

fn render(source: &str, messages: &[ChatMessage]) -> anyhow::Result<String> {
    Ok(PromptTemplate::from_jinja(source, "<s>", "</s>")?.render(messages)?)
}

#[test]
fn vicuna_is_written_as_published() -> anyhow::Result<()> {
    let template = PromptTemplate::vicuna_v1_1()?;
    assert_eq!(
        template.render(&[ChatMessage::user("What is the sun?")])?,
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, \
         detailed, and polite answers to the user's questions. USER: What is the sun? ASSISTANT:"
    );
    Ok(())
}

#[test]
fn vicuna_has_a_space_after_the_user_and_none_after_the_assistant() -> anyhow::Result<()> {
    // FastChat: conv.sep " ", conv.sep2 "</s>", SeparatorStyle.ADD_COLON_TWO.
    let mut messages = vec![system("Be brief.")];
    messages.extend(chat());
    let text = PromptTemplate::vicuna_v1_1()?.render(&messages)?;
    assert_eq!(text, "Be brief. USER: Hi ASSISTANT: Hello</s>USER:  Bye  ASSISTANT:");
    Ok(())
}

#[test]
fn a_template_in_the_style_of_llama_3() -> anyhow::Result<()> {
    let source = "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + \
                  '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}{% endfor %}\
                  {% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}";
    let template = PromptTemplate::from_jinja(source, "<|begin_of_text|>", "<|eot_id|>")?;
    assert_eq!(
        template.render(&chat()[2..])?,
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>\
         <|start_header_id|>assistant<|end_header_id|>\n\n"
    );
    Ok(())
}

#[test]
fn a_template_in_the_style_of_mistral() -> anyhow::Result<()> {
    let source = "{%- if messages[0]['role'] == 'system' %}\n    {%- set system_message = messages[0]['content'] %}\n    \
                  {%- set loop_messages = messages[1:] %}\n{%- else %}\n    {%- set loop_messages = messages %}\n\
                  {%- endif %}\n\n{{- bos_token }}\n{%- for message in loop_messages %}\n    \
                  {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\n        \
                  {{- raise_exception('roles must alternate') }}\n    {%- endif %}\n    \
                  {%- if message['role'] == 'user' %}\n        {%- if loop.first and system_message is defined %}\n            \
                  {{- ' [INST] ' + system_message + '\\n\\n' + message['content'] + ' [/INST]' }}\n        {%- else %}\n            \
                  {{- ' [INST] ' + message['content'] + ' [/INST]' }}\n        {%- endif %}\n    {%- else %}\n        \
                  {{- ' ' + message['content'] + eos_token}}\n    {%- endif %}\n{%- endfor %}\n";
    assert_eq!(
        render(source, &chat())?,
        "<s> [INST] Hi [/INST] Hello</s> [INST]  Bye  [/INST]"
    );
    assert_eq!(
        render(source, &[system("S"), ChatMessage::user("Hi")])?,
        "<s> [INST] S\n\nHi [/INST]"
    );
    let err = render(source, &[ChatMessage::user("a"), ChatMessage::user("b")]).expect_err("two users");
    assert!(err.to_string().contains("roles must alternate"), "{err}");
    Ok(())
}

#[test]
fn a_template_in_the_style_of_qwen() -> anyhow::Result<()> {
    let source = "{%- set ns = namespace(last=-1) %}\n{%- for message in messages[::-1] %}\n    \
                  {%- set index = (messages|length - 1) - loop.index0 %}\n    \
                  {%- if ns.last < 0 and message.role == 'user' and message.content is string %}\n        \
                  {%- set ns.last = index %}\n    {%- endif %}\n{%- endfor %}\n\
                  {%- for message in messages %}\n    {%- set content = message.content %}\n    \
                  {%- if message.role == 'assistant' and '</think>' in content %}\n        \
                  {%- set content = content.split('</think>')[-1].lstrip('\\n') %}\n    {%- endif %}\n    \
                  {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}\n{%- endfor %}\n\
                  {%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n    \
                  {%- if enable_thinking is defined and enable_thinking is false %}\n        \
                  {{- '<think>\\n\\n</think>\\n\\n' }}\n    {%- endif %}\n{%- endif %}";
    let messages = [
        ChatMessage::user("Hi"),
        ChatMessage::assistant("<think>\nhm\n</think>\n\nHello"),
        ChatMessage::user("Bye"),
    ];
    assert_eq!(
        render(source, &messages)?,
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n\
         <|im_start|>assistant\n"
    );
    Ok(())
}

#[test]
fn blocks_take_their_line_with_them() -> anyhow::Result<()> {
    // trim_blocks and lstrip_blocks, as transformers sets them.
    let source = "{% for m in messages %}\n  {% if true %}\n{{ m.role }}\n  {% endif %}\n{% endfor %}\nend";
    assert_eq!(render(source, &chat())?, "user\nassistant\nuser\nend");
    Ok(())
}

#[test]
fn a_template_that_refuses_says_why() -> anyhow::Result<()> {
    let source =
        "{% if messages[0]['role'] != 'system' %}{{ raise_exception('a system turn comes first') }}{% endif %}";
    let err = render(source, &chat()).expect_err("refused").to_string();
    assert!(
        err.contains("a system turn comes first") && !err.contains('\n'),
        "{err}"
    );
    assert!(PromptTemplate::from_jinja("{% if %}", "", "").is_err());
    Ok(())
}

#[test]
fn python_string_methods_work() -> anyhow::Result<()> {
    let source = "{{ messages[2].content.strip().upper() }}|{{ messages[0].content.startswith('H') }}|\
                  {{ messages[0].get('tool', 'none') }}|{{ 'a-b'.split('-')[1] }}|{{ 'tool call'.title() }}|\
                  {{ 'a-b-c'.split('-', 1)[1] }}|{{ ','.join(['x', 'y']) }}|{{ 'xxay'.lstrip('x') }}";
    assert_eq!(render(source, &chat())?, "BYE|True|none|b|Tool Call|b-c|x,y|ay");
    let source = "{% for key, value in messages[0].items() %}{{ key }}={{ value }};{% endfor %}";
    assert_eq!(render(source, &chat())?, "role=user;content=Hi;");
    Ok(())
}

#[test]
fn json_is_written_as_python_writes_it() -> anyhow::Result<()> {
    let source = "{{ {'a': [1, 'é<'], 'b': {}} | tojson }}";
    assert_eq!(render(source, &[])?, r#"{"a": [1, "é<"], "b": {}}"#);
    let source = "{{ {'a': [1]} | tojson(indent=2) }}";
    assert_eq!(render(source, &[])?, "{\n  \"a\": [\n    1\n  ]\n}");
    Ok(())
}

#[test]
fn marks_of_generation_are_read_over_and_loops_may_break() -> anyhow::Result<()> {
    let source =
        "{% for m in messages %}{%- generation -%} {{ m.content }} {%- endgeneration -%}{% break %}{% endfor %}";
    assert_eq!(render(source, &chat())?, "Hi");
    Ok(())
}

#[test]
fn a_folder_names_its_template_in_either_file() -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let render = || -> Result<String, ModelError> { PromptTemplate::from_folder(dir.path())?.render(&chat()[..1]) };
    assert!(render()?.ends_with("USER: Hi ASSISTANT:"), "none: Vicuna's");
    let config = dir.path().join("tokenizer_config.json");
    std::fs::write(
        &config,
        r#"{"bos_token": {"content": "<b>"}, "chat_template": "{{ bos_token }}one"}"#,
    )?;
    assert_eq!(render()?, "<b>one");
    let named = r#"{"chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]}"#;
    std::fs::write(&config, named)?;
    assert_eq!(render()?, "d");
    std::fs::write(dir.path().join("chat_template.jinja"), "file")?;
    assert_eq!(render()?, "file");
    std::fs::write(&config, "{")?;
    assert!(
        render()
            .expect_err("cut")
            .to_string()
            .contains("tokenizer_config.json: malformed")
    );
    Ok(())
}
