# One image for the chat, the environment and the questions API; compose.yaml runs them.
FROM python:3.11-slim
RUN useradd --create-home sqlbench
WORKDIR /app
COPY pyproject.toml constraints-laptop.txt README.md LICENSE ./
COPY pocket pocket
COPY sql_env sql_env
COPY sqlbench sqlbench
COPY sqlbench_chat sqlbench_chat
COPY sqlbench_data sqlbench_data
COPY sqlbench_lab sqlbench_lab
COPY sqlbench_train sqlbench_train
COPY verl_cpu verl_cpu
# The CPU build of torch, at the version that constraints-laptop.txt pins.
RUN pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu \
    -c constraints-laptop.txt '.[agent,environment,notebooks]'
RUN sqlbench data pocket && mkdir results && chown -R sqlbench data results
USER sqlbench
EXPOSE 8000 8001 8866
CMD ["sqlbench", "env", "--host", "0.0.0.0"]
