"Tests run without a network, without a screen and on few threads."
import os

for name, value in dict(OMP_NUM_THREADS='2', MPLBACKEND='Agg', HF_HUB_OFFLINE='1', TRANSFORMERS_OFFLINE='1', GRADIO_ANALYTICS_ENABLED='False',
                        HF_HUB_DISABLE_TELEMETRY='1', TOKENIZERS_PARALLELISM='false').items(): os.environ.setdefault(name, value)
