# docker build -t template .
# docker run --rm -v "$PWD/logs:/project/logs" -v "$PWD/data:/project/data" template src.train trainer=cpu
FROM python:3.12-slim
WORKDIR /project
COPY requirements.txt .
RUN pip install --no-cache-dir --require-hashes -r requirements.txt
COPY . .
RUN useradd --create-home --uid 1000 researcher && mkdir -p data && chown 1000 data logs
USER 1000
ENTRYPOINT ["python", "-m"]
CMD ["src.train"]
