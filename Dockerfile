# docker build -t simcrop . && docker run --rm -it simcrop
# For CUDA: a base image with Python 3.11, and torch of your CUDA version before the requirements, as pytorch.org says.
FROM python:3.11-slim
WORKDIR /simcrop
COPY . .
RUN pip install --no-cache-dir -r requirements.txt
WORKDIR /simcrop/bundles/pretrain
CMD ["python", "-m", "monai.bundle", "run", "--config_file", "['configs/train.json','configs/demo.json']"]
