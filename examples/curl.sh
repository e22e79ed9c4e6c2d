#!/usr/bin/env bash
# Every route with curl:  OPENAI_BASE_URL=http://localhost:8000/v1 bash examples/curl.sh chatglm2-6b
set -euo pipefail
base=${OPENAI_BASE_URL:-http://localhost:8000/v1}
model=${1:-chatglm2-6b}
json='Content-Type: application/json'

curl -fsS "$base/models"; echo
curl -fsS "$base/models/$model"; echo
curl -fsS "$base/chat/completions" -H "$json" \
  -d "{\"model\": \"$model\", \"messages\": [{\"role\": \"user\", \"content\": \"Hello! What is your name?\"}], \"max_tokens\": 41}"; echo
curl -fsSN "$base/chat/completions" -H "$json" \
  -d "{\"model\": \"$model\", \"messages\": [{\"role\": \"user\", \"content\": \"你是谁？\"}], \"max_tokens\": 8, \"stream\": true}" \
  | tail -n 2 | grep -q '^data: \[DONE\]'
curl -fsS "$base/completions" -H "$json" \
  -d "{\"model\": \"$model\", \"prompt\": \"Once upon a time\", \"max_tokens\": 41, \"temperature\": 0.5}"; echo
curl -fsS "$base/embeddings" -H "$json" -d "{\"model\": \"$model\", \"input\": \"Hello world!\"}" | cut -c 1-200

# A model that nobody serves is a 404 that names those served; without a Content-Type the body is JSON all the same.
status=$(curl -sS -o /dev/stderr -w '%{http_code}' "$base/completions" -d '{"model": "vicuna-7b-v1.3", "prompt": "Hi"}')
[ "$status" = 404 ]
