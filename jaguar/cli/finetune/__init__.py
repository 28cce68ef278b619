"""`jaguar finetune` and `jaguar eval`: data, the run, its figures and its pictures."""
